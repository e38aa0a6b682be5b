"""Which stages train from which epoch on, and from where the network has to be run."""

from abc import ABC
from collections.abc import Sequence

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import Self

from tl_lightning.backbones import Backbone
from tl_lightning.freezing import HEAD, FreezePolicy, as_frozen


class StageSchedule(ABC):
    """A callback that lets stages train from given epochs on."""

    schedule: dict[int, str | int]
    """From which epoch on, which stage and all after it; before the first of them, the head alone."""


class StagesMixin(LightningModule):
    """A module with a backbone, of which some stages train, and a head."""

    backbone: Backbone
    head: nn.Module
    freeze_policy: FreezePolicy

    def train_from(self, stage: str | int) -> None:
        """Let the head train, and the backbone from a stage on; ``"head"`` is the head alone.

        A subclass with another order of stages overrides :meth:`stages_from`.

        Raises:
            ValueError: There is no such stage, or it may not train.
        """
        names = self.stages_from(stage)
        wrong = [name for name in names if name not in self.freeze_policy.trainable]
        if wrong:
            raise ValueError(
                f"stages_from({stage!r}) of {type(self).__name__} gives {', '.join(wrong)}, and only "
                f"{', '.join(self.freeze_policy.trainable) or 'the head'} may train: return some of these"
            )
        self.freeze_policy.train(names)

    def stages_from(self, stage: str | int) -> Sequence[str]:
        """Return the names of the backbone's stages that train when training goes from ``stage`` on."""
        return self.freeze_policy.stages_from(stage)

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores.

        Shape:
            images: (N, 3, H, W). Output: (N, K).
        """
        return self.forward_from(images, None)

    def forward_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        """Continue from a boundary to class scores.

        Args:
            inputs: Images (N, 3, H, W), or what the backbone's part before ``boundary`` made of them.
            boundary: First stage that is still to come, ``"head"`` if none is; None for images.

        Shape:
            Output: (N, K).
        """
        logits: Tensor = self.head(self.features_from(inputs, boundary))
        return logits

    def features_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        """Continue from a boundary to what the head takes; without autograd up to where the backbone may train.

        Raises:
            ValueError: The inputs come from a boundary before which a part that may train lies.
        """
        if boundary == HEAD:
            return inputs
        first = self.freeze_policy.boundary
        if first == HEAD:
            rest = self.backbone if boundary is None else self.backbone.split(boundary)[1]
            with as_frozen(inputs.device.type):
                return rest(inputs)  # type: ignore[no-any-return]  # a module's output
        if boundary is None:
            prefix, suffix = self.backbone.split(first)
            with as_frozen(inputs.device.type):
                inputs = prefix(inputs)
            return self.run_suffix(suffix, inputs)
        stages = self.backbone.stages
        if stages.index(boundary) < stages.index(first):
            raise ValueError(f"activations of the boundary {boundary!r} are given, and training begins at {first!r}")
        return self.run_suffix(self.backbone.split(boundary)[1], inputs)

    def run_suffix(self, suffix: nn.Module, inputs: Tensor) -> Tensor:
        """Run the part of the backbone that may train."""
        features: Tensor = suffix(inputs)
        return features

    def train(self, mode: bool = True) -> Self:
        """Switch everything but the frozen parts to train mode, or everything to eval mode."""
        super().train(mode)
        self.freeze_policy.freeze(training=mode)
        return self

    # For data modules that store what does not change ---------------------------------------------------------------

    def boundaries(self) -> dict[int, str]:
        """Return from which epoch on which boundary the network has to be run from: nothing before it has trained by then.

        It is a function of the epoch alone, and never moves towards the output again, since what has trained once is not
        what it was.
        """
        schedule: dict[int, str | int] = {0: self.freeze_policy.trainable[0] if self.freeze_policy.trainable else HEAD}
        for callback in [] if self._trainer is None else self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
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
