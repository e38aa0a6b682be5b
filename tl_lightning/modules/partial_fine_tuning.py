"""Partial and full fine-tuning."""

import math
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from tl_lightning.backbones import Backbone
from tl_lightning.freezing import HEAD
from tl_lightning.heads import HeadCallable
from tl_lightning.modules._optimization import HEAD_TO_BACKBONE
from tl_lightning.modules.base import TransferClassifier


class PartialFineTuning(TransferClassifier):
    """Train a head and the backbone from a stage on; from the first stage on, this is full fine-tuning.

    The stages before it stay exactly as they are. Batch norm keeps its pre-trained statistics unless ``train_bn``. With
    :class:`tl_lightning.callbacks.StagedUnfreezing`, the stages from ``unfreeze_from`` on start to train one after the
    other. Auxiliary heads, such as those of Inception, train together with the stage that feeds them.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        unfreeze_from: The deepest stage that trains: its name, one of ``backbone.stages``; or a number k for the last k
            stages; or a module or parameter inside a stage, by its name in the network.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        head: Class of the head, or a ``functools.partial`` of one, called with the number of features and K; None takes
            a linear layer.
        lr: Learning rate of the head, per optimizer step.
        backbone_lr: Learning rate of the last stage; None takes a tenth of ``lr``.
        layer_decay: Factor from the learning rate of a stage to that of the stage before it
            (https://arxiv.org/abs/1801.06146, section 3.2).
        train_bn: Let batch norm in the trainable stages normalise by the batch and update its statistics.
        optimizer: Builds the optimizer from parameter groups, without a learning rate; None builds AdamW.
        scheduler: Builds the learning rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: Interval of the given scheduler.

    Raises:
        ValueError: The stage is unknown, a rate is not above 0, the head takes the spatial map, or see
            :class:`TransferClassifier`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        unfreeze_from: str | int,
        class_names: Sequence[str] | None = None,
        head: HeadCallable | None = None,
        lr: float = 1e-3,
        backbone_lr: float | None = None,
        layer_decay: float = 0.75,
        train_bn: bool = False,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if unfreeze_from in (0, "0", HEAD):
            raise ValueError(
                f"unfreeze_from is {unfreeze_from!r}, so nothing of the backbone would train: use LinearProbe"
            )
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay is {layer_decay}; it is a factor above 0 and at most 1")
        if backbone_lr is not None and not 0 < backbone_lr < math.inf:
            raise ValueError(
                f"backbone_lr is {backbone_lr}; it must be above 0 and finite. To freeze the backbone, use LinearProbe"
            )
        self.backbone_lr = backbone_lr
        self.layer_decay = layer_decay
        super().__init__(
            backbone,
            num_classes,
            class_names,
            lr,
            optimizer,
            scheduler,
            scheduler_interval,
            head,
            unfreeze_from,
            train_bn,
        )

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the head and of each stage that may train, from the last one on."""
        last = self.lr / HEAD_TO_BACKBONE if self.backbone_lr is None else self.backbone_lr
        stages = reversed(self.freeze_policy.unfreezable)
        return super().learning_rates() | {stage: last * self.layer_decay**depth for depth, stage in enumerate(stages)}
