"""A frozen backbone with any head."""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from tl_lightning.backbones import Backbone
from tl_lightning.heads import HeadCallable
from tl_lightning.modules.base import TransferClassifier


class CustomHeadClassifier(TransferClassifier):
    """Train any head on a frozen backbone: on its pooled features, or on its spatial map.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        head: Class of the head, or a ``functools.partial`` of one, called with the number of features and K. A
            :class:`tl_lightning.heads.MapHead` gets the spatial map and its number of channels instead.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        lr: Learning rate of the head, per optimizer step.
        optimizer: Builds the optimizer from parameter groups, without a learning rate; None builds AdamW.
        scheduler: Builds the learning rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: Interval of the given scheduler.

    Raises:
        ValueError: The head is a lambda, a function or a local class, which no checkpoint could restore; or the
            network has no spatial map for a head that takes one; or see :class:`TransferClassifier`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        head: HeadCallable,
        class_names: Sequence[str] | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(backbone, num_classes, class_names, lr, optimizer, scheduler, scheduler_interval, head)
