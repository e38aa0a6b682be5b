"""The linear probe."""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from tl_lightning.backbones import Backbone
from tl_lightning.heads import LinearHead
from tl_lightning.modules.base import TransferClassifier


class LinearProbe(TransferClassifier):
    """Train one linear layer on the standardised features of a frozen backbone.

    Try this first on any data: it takes minutes and has few ways to go wrong (https://arxiv.org/abs/1805.08974, section
    4).

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        lr: Learning rate of the head, per optimizer step.
        optimizer: Builds the optimizer from parameter groups, without a learning rate; None builds AdamW.
        scheduler: Builds the learning rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: Interval of the given scheduler.

    Raises:
        ValueError: See :class:`TransferClassifier`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(backbone, num_classes, class_names, lr, optimizer, scheduler, scheduler_interval)

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the standardisation and the linear layer."""
        return LinearHead(in_features, num_classes, standardize=True)
