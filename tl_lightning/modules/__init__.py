"""Lightning modules: a file for each strategy, and the base that they share."""

from tl_lightning.modules._frozen_guard import FrozenDriftError, FrozenGuard
from tl_lightning.modules._stages import StageSchedule
from tl_lightning.modules.base import TransferClassifier
from tl_lightning.modules.custom_head import CustomHeadClassifier
from tl_lightning.modules.feature_cache import FeatureCacheClassifier
from tl_lightning.modules.linear_probe import LinearProbe
from tl_lightning.modules.partial_fine_tuning import PartialFineTuning

__all__ = [
    "CustomHeadClassifier",
    "FeatureCacheClassifier",
    "FrozenDriftError",
    "FrozenGuard",
    "LinearProbe",
    "PartialFineTuning",
    "StageSchedule",
    "TransferClassifier",
]
