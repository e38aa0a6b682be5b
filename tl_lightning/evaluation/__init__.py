"""Scores as they may be believed: plain functions on arrays."""

from tl_lightning.evaluation.intervals import Interval, best_of_many, share

__all__ = ["Interval", "best_of_many", "share"]
