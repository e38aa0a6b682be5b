"""Confidence intervals of scores, and the choice among candidates: plain functions on tensors."""

from tl_lightning.evaluation.intervals import Interval, bias_corrected_best, wilson_interval
from tl_lightning.evaluation.selection import simplest_within_one_standard_error

__all__ = ["Interval", "bias_corrected_best", "simplest_within_one_standard_error", "wilson_interval"]
