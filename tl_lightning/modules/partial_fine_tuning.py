"""Partial and full fine-tuning."""

import copy
import math
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from tl_lightning import freezing
from tl_lightning.backbones import Backbone, Segment, stages_of
from tl_lightning.batch import Batch
from tl_lightning.freezing import HEAD, FreezePolicy
from tl_lightning.heads import HeadCallable, LinearHead, MapHead, check_head_factory, resize_last_linear
from tl_lightning.modules.base import TransferClassifier
from tl_lightning.utils.serialization import as_factory

HEAD_TO_BACKBONE = 10
"""How many times faster than the last stage the head learns, where no rate is given for the backbone."""


class PartialFineTuning(TransferClassifier):
    """Train a head and the backbone from a stage on; with the first stage, this is full fine-tuning.

    What lies before the stage stays exactly as it is. Batch norm keeps the statistics of pre-training unless ``train_bn``.
    With :class:`tl_lightning.callbacks.StagedUnfreezing`, the stages from ``unfreeze_from`` on begin to train one after
    the other. Auxiliary heads, as those of Inception, are trained where the part that feeds them is
    (https://arxiv.org/abs/1512.00567, section 4).

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        unfreeze_from: The deepest stage that trains: its name, one of ``backbone.stages``; or a number k for the last k
            stages; or a module or parameter inside a stage, by its name in the network.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        head: Class of the head, or a ``functools.partial`` of one, called with the number of features and K; None takes a
            linear layer.
        lr: Learning rate of the head, per optimizer step.
        backbone_lr: Learning rate of the last stage; None takes a tenth of ``lr``.
        layer_decay: Factor from the rate of a stage to that of the stage before it
            (https://arxiv.org/abs/1801.06146, section 3.2).
        train_bn: Let the batch norm of the stages that train normalise by the batch and move its statistics.
        optimizer: Makes the optimizer from parameter groups, without a learning rate; None makes AdamW.
        scheduler: Makes the learning-rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: What the given scheduler counts.

    Raises:
        ValueError: There is no such stage, a rate is not above 0, or what :class:`TransferClassifier` raises.
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
        check_head_factory(head or LinearHead)
        factory = as_factory(head or LinearHead)
        self.head_factory = factory or head or LinearHead  # construction refuses what is no factory
        if factory is not None and issubclass(factory.func, MapHead):  # type: ignore[arg-type]  # a class
            raise ValueError(
                f"{factory.func.__name__} takes the spatial map, which PartialFineTuning does not hand over; use it with "
                "CustomHeadClassifier, or choose a head on pooled features"
            )
        super().__init__(backbone, num_classes, class_names, lr, optimizer, scheduler, scheduler_interval)
        self.backbone_lr = backbone_lr
        self.layer_decay = layer_decay
        self.freeze_policy = FreezePolicy(backbone, unfreeze_from, train_bn=train_bn)
        self.auxiliary_heads = nn.ModuleDict()
        self._auxiliary = {
            n: h for n, h in backbone.auxiliary_heads().items() if h.after in self.freeze_policy.trainable
        }
        for name, auxiliary in self._auxiliary.items():
            self.auxiliary_heads[name] = resize_last_linear(copy.deepcopy(auxiliary.module), num_classes)
        self._auxiliary_logits: list[tuple[float, Tensor]] = []
        self.train_from(self.freeze_policy.trainable[0])

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the head that was chosen."""
        return self.head_factory(in_features, num_classes)

    def train_from(self, stage: str | int) -> None:
        """Let the head train, and the backbone from a stage on, with the auxiliary heads that it feeds."""
        super().train_from(stage)
        for name, auxiliary in self._auxiliary.items():
            freezing.switch(self.auxiliary_heads[name], auxiliary.after in self.freeze_policy.trained)

    def learning_rates(self) -> dict[str, float]:
        """Return the rates of the head and of each stage that may train, from the last one on."""
        last = self.lr / HEAD_TO_BACKBONE if self.backbone_lr is None else self.backbone_lr
        stages = reversed(self.freeze_policy.trainable)
        return super().learning_rates() | {stage: last * self.layer_decay**depth for depth, stage in enumerate(stages)}

    def run_suffix(self, suffix: nn.Module, inputs: Tensor) -> Tensor:
        """Run the part of the backbone that may train, and in training the auxiliary heads that branch off it."""
        active = {
            h.after: n for n, h in self._auxiliary.items() if self.training and h.after in self.freeze_policy.trained
        }
        if not active or not isinstance(suffix, Segment):
            return super().run_suffix(suffix, inputs)
        for stage, run in stages_of(suffix):
            inputs = run(inputs)
            if stage in active:
                name = active[stage]
                self._auxiliary_logits.append((self._auxiliary[name].weight, self.auxiliary_heads[name](inputs)))
        return inputs

    def training_loss(self, batch: Batch) -> Tensor:
        """Compute the mean loss of a training batch, the weighted ones of auxiliary heads included."""
        self._auxiliary_logits.clear()
        loss = super().training_loss(batch)
        for weight, logits in self._auxiliary_logits:
            loss = loss + weight * self.compute_loss(logits, batch.target)
        self._auxiliary_logits.clear()
        return loss
