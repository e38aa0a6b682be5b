"""A head of the user's own."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from tl_lightning.backbones import Backbone
from tl_lightning.freezing import MAP, as_frozen
from tl_lightning.heads import HeadCallable, MapHead, check_head_factory
from tl_lightning.modules.base import TransferClassifier
from tl_lightning.utils.serialization import as_factory


class CustomHeadClassifier(TransferClassifier):
    """Train any head on a frozen backbone: on its pooled features, or on its spatial map.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        head: Class of the head, or a ``functools.partial`` of one, called with the number of features and K. A
            :class:`tl_lightning.heads.MapHead` gets the spatial map and its number of channels instead.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        lr: Learning rate of the head, per optimizer step.
        optimizer: Makes the optimizer from parameter groups, without a learning rate; None makes AdamW.
        scheduler: Makes the learning-rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: What the given scheduler counts.

    Raises:
        ValueError: The head is a lambda, a function or a local class, which no checkpoint could bring back; the network has
            no spatial map for a head that wants one; or what :class:`TransferClassifier` raises.
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
        check_head_factory(head)
        factory = as_factory(head)
        self.head_factory = factory or head  # construction refuses what is no factory
        self.on_map = factory is not None and issubclass(factory.func, MapHead)  # type: ignore[arg-type]  # a class
        super().__init__(backbone, num_classes, class_names, lr, optimizer, scheduler, scheduler_interval)

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the head that was chosen."""
        return self.head_factory(self._channels() if self.on_map else in_features, num_classes)

    def _channels(self) -> int:
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            images = torch.zeros(1, 3, *self.backbone.preprocessing.crop_shape)
            channels = self.backbone.forward_map(images).shape[1]
        self.backbone.train(was_training)
        return channels

    def features_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        """Continue from a boundary to what the head takes: the pooled features, or the map.

        Raises:
            ValueError: The head takes the map, and the inputs come from a boundary inside the backbone.
        """
        if not self.on_map:
            return super().features_from(inputs, boundary)
        if boundary == MAP:
            return inputs
        if boundary is not None:
            raise ValueError(
                f"the head takes the spatial map, which cannot be continued from the boundary {boundary!r}"
            )
        with as_frozen(inputs.device.type):
            return self.backbone.forward_map(inputs)

    def boundaries(self) -> dict[int, str]:
        """Return from which epoch on which boundary the network has to be run from: the end of all that is frozen."""
        return {0: MAP} if self.on_map else super().boundaries()
