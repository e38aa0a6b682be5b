"""Callbacks: what happens beside training."""

from tl_lightning.callbacks.averaging import EMA
from tl_lightning.callbacks.outcome import Outcome
from tl_lightning.callbacks.plan import Plan
from tl_lightning.callbacks.predictions import PredictionWriter
from tl_lightning.callbacks.probe_fallback import ProbeFallback
from tl_lightning.callbacks.progress import Progress
from tl_lightning.callbacks.staged_unfreezing import StagedUnfreezing
from tl_lightning.modules.frozen_guard import FrozenDriftError, FrozenGuard

__all__ = [
    "EMA",
    "FrozenDriftError",
    "FrozenGuard",
    "Outcome",
    "Plan",
    "PredictionWriter",
    "ProbeFallback",
    "Progress",
    "StagedUnfreezing",
]
