"""Scores as they may be believed: plain functions on arrays."""

from tl_lightning.evaluation.intervals import Interval, best_of_many, share
from tl_lightning.evaluation.selection import simplest_within_one_standard_error

__all__ = ["Interval", "best_of_many", "share", "simplest_within_one_standard_error"]
