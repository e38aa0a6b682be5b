"""Callbacks: what happens beside training."""

from tl_lightning.callbacks.plan import Outcome, Plan
from tl_lightning.callbacks.predictions import PredictionWriter
from tl_lightning.callbacks.progress import Progress

__all__ = ["Outcome", "Plan", "PredictionWriter", "Progress"]
