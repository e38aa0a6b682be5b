"""Lightning modules: a file for each strategy."""

from tl_lightning.modules._frozen_guard import FrozenGuard
from tl_lightning.modules._stages import StageSchedule
from tl_lightning.modules.base import TransferClassifier
from tl_lightning.modules.custom_head import CustomHeadClassifier
from tl_lightning.modules.feature_cache import FeatureCacheClassifier
from tl_lightning.modules.linear_probe import LinearProbe
from tl_lightning.modules.partial_fine_tuning import PartialFineTuning

__all__ = [
    "CustomHeadClassifier",
    "FeatureCacheClassifier",
    "FrozenGuard",
    "LinearProbe",
    "PartialFineTuning",
    "StageSchedule",
    "TransferClassifier",
]
