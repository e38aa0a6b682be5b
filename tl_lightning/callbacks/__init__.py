"""Callbacks of the trainer; each docstring says how to use it in Python and on the command line."""

from tl_lightning.callbacks.ema import EMA
from tl_lightning.callbacks.plan import Plan
from tl_lightning.callbacks.prediction_writer import PredictionWriter
from tl_lightning.callbacks.probe_fallback import ProbeFallback
from tl_lightning.callbacks.progress import Progress
from tl_lightning.callbacks.staged_unfreezing import StagedUnfreezing
from tl_lightning.callbacks.summary import Summary
from tl_lightning.lightning_fixes.finite_guard import FiniteGuard, NotFiniteError
from tl_lightning.modules._frozen_guard import FrozenDriftError, FrozenGuard

__all__ = [
    "EMA",
    "FiniteGuard",
    "FrozenDriftError",
    "FrozenGuard",
    "NotFiniteError",
    "Plan",
    "PredictionWriter",
    "ProbeFallback",
    "Progress",
    "StagedUnfreezing",
    "Summary",
]
