"""The stages of a classifier: which of them train, and where a forward pass may start."""

from abc import ABC
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import Self

from tl_lightning.backbones import Backbone
from tl_lightning.freezing import HEAD, MAP, FreezePolicy, frozen_forward
from tl_lightning.heads import HeadCallable, MapHead
from tl_lightning.lightning_fixes.checks import callbacks_of
from tl_lightning.modules.auxiliary import AuxiliaryHeads
from tl_lightning.utils.serialization import as_factory


class StageSchedule(ABC):
    """Base class of callbacks that unfreeze stages at given epochs."""

    schedule: dict[int, str | int]
    """Maps an epoch to the first stage that trains from this epoch on; before the first one, the head trains alone."""


def is_map_head(head: HeadCallable) -> bool:
    """Return whether a head takes the spatial map."""
    factory = as_factory(head)
    return factory is not None and issubclass(factory.func, MapHead)  # type: ignore[arg-type]  # the partial of a class


def head_name(head: HeadCallable) -> str:
    """Return the name of a head's class, for messages."""
    factory = as_factory(head)
    return type(head).__name__ if factory is None else factory.func.__name__


class StagesMixin(LightningModule):
    """A module with a backbone, some stages of which train, and a head."""

    backbone: Backbone
    head: nn.Module
    head_factory: HeadCallable
    on_map: bool
    """Whether the head takes the spatial map."""
    freeze_policy: FreezePolicy
    auxiliary_heads: AuxiliaryHeads

    def train_from(self, stage: str | int) -> None:
        """Train the head and the backbone from a stage on; ``"head"`` trains the head alone.

        A subclass with another order of stages overrides :meth:`stages_from`.

        Raises:
            ValueError: The stage is unknown, or may not train.
        """
        names = self.stages_from(stage)
        forbidden = [name for name in names if name not in self.freeze_policy.unfreezable]
        if forbidden:
            raise ValueError(
                f"stages_from({stage!r}) of {type(self).__name__} gives {', '.join(forbidden)}, but only "
                f"{', '.join(self.freeze_policy.unfreezable) or 'the head'} may train: return some of these"
            )
        self.freeze_policy.unfreeze_only(names)
        self.auxiliary_heads.train_with(names)

    def stages_from(self, stage: str | int) -> Sequence[str]:
        """Return the names of the stages that train when training goes from ``stage`` on."""
        return self.freeze_policy.stages_from(stage)

    def map_channels(self) -> int:
        """Return the number of channels of the backbone's spatial map."""
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            images = torch.zeros(1, 3, *self.backbone.preprocessing.crop_shape)
            channels = self.backbone.forward_map(images).shape[1]
        self.backbone.train(was_training)
        return channels

    # Forward ----------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of images.

        Shape:
            images: (N, 3, H, W). Output: (N, K).
        """
        return self.forward_from(images, None)

    def forward_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        """Continue from a boundary to the logits.

        Args:
            inputs: Images (N, 3, H, W), or the activations (N, ...) that the backbone computes before ``boundary``.
            boundary: The first stage to run, ``"head"`` for none of the backbone; None for images.

        Shape:
            Output: (N, K).
        """
        logits: Tensor = self.head(self.features_from(inputs, boundary))
        return logits

    def features_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        """Continue from a boundary to the input of the head; the frozen stages run without autograd.

        Shape:
            Output: pooled features (N, D), or the spatial map (N, C, h, w) for a head that takes it.

        Raises:
            ValueError: The boundary lies behind a trainable stage, or the spatial map cannot be computed from it.
        """
        if self.on_map:
            return self._map_from(inputs, boundary)
        if boundary == HEAD:
            return inputs
        first = self.freeze_policy.boundary
        if first == HEAD:
            rest = self.backbone if boundary is None else self.backbone.split(boundary)[1]
            with frozen_forward(inputs.device.type):
                return rest(inputs)  # type: ignore[no-any-return]  # the output of a module
        if boundary is None:
            prefix, suffix = self.backbone.split(first)
            with frozen_forward(inputs.device.type):
                inputs = prefix(inputs)
            return self.run_suffix(suffix, inputs)
        stages = self.backbone.stages
        if stages.index(boundary) < stages.index(first):
            raise ValueError(f"activations of the boundary {boundary!r} are given, but training starts at {first!r}")
        return self.run_suffix(self.backbone.split(boundary)[1], inputs)

    def _map_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        if boundary == MAP:
            return inputs
        if boundary is not None:
            raise ValueError(f"the head takes the spatial map, which cannot be computed from the boundary {boundary!r}")
        with frozen_forward(inputs.device.type):
            return self.backbone.forward_map(inputs)

    def run_suffix(self, suffix: nn.Module, inputs: Tensor) -> Tensor:
        """Run the trainable part of the backbone and, in training, the auxiliary heads."""
        if self.training:
            return self.auxiliary_heads.run(suffix, inputs)
        features: Tensor = suffix(inputs)
        return features

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; frozen stages stay in eval mode."""
        super().train(mode)
        self.freeze_policy.freeze(training=mode)
        return self

    # For data modules that cache frozen stages ------------------------------------------------------------------------

    def boundaries(self) -> dict[int, str]:
        """Map each epoch in which the boundary moves, 0 first, to the first stage whose input can still be cached.

        This is a function of the epoch alone. The boundary never moves towards the output again, because a stage that
        has trained once has changed.
        """
        if self.on_map:
            return {0: MAP}
        schedule: dict[int, str | int] = {0: next(iter(self.freeze_policy.unfreezable), HEAD)}
        # LightningModule.trainer raises without a trainer; only _trainer can be asked.
        for callback in [] if self._trainer is None else callbacks_of(self.trainer):
            if isinstance(callback, StageSchedule):
                schedule = {0: HEAD, **callback.schedule}
        names = list(self.freeze_policy.stages)
        first = len(names)
        found = {}
        for epoch, stage in sorted(schedule.items()):
            first = min([first, *(names.index(name) for name in self.stages_from(stage))])
            own = [name for name in names[: first + 1] if name in self.backbone.stages]  # a stage may be cut inside
            found[epoch] = HEAD if first == len(names) else own[-1]
        return found
