"""Scores as they may be believed: plain functions on arrays."""

from tl_lightning.evaluation.intervals import Interval, bias_corrected_best, wilson_interval
from tl_lightning.evaluation.selection import simplest_within_one_standard_error

__all__ = ["Interval", "bias_corrected_best", "simplest_within_one_standard_error", "wilson_interval"]
