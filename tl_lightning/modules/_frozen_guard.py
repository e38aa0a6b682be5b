"""Prove that what is frozen does not move, and that ranks agree."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from tl_lightning.freezing import FreezePolicy
from tl_lightning.utils.distributed import all_gather_object
from tl_lightning.utils.hashing import fingerprints

_LISTED = 5


class FrozenDriftError(RuntimeError):
    """A frozen tensor has changed, or replicas differ."""


class FrozenGuard(Callback):
    """Take a fingerprint of everything frozen when a stage begins, and compare it when the stage, or the fit, ends.

    On several ranks, all parameters and frozen buffers must then be the same on each as well. Every classifier brings
    one; to go without, override ``configure_callbacks``.
    """

    def __init__(self) -> None:
        self._trained: frozenset[str] | None = None
        self._before: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the fingerprint of what the first stage leaves alone."""
        self._begin(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare where a stage has ended, and begin again.

        Raises:
            FrozenDriftError: Something frozen has changed, or replicas differ.
        """
        if self._trained != _staging(pl_module).trained:
            self.end_stage(trainer, pl_module)
            self._begin(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare at the end of the fit.

        Raises:
            FrozenDriftError: Something frozen has changed, or replicas differ.
        """
        self.end_stage(trainer, pl_module)

    def end_stage(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, unless that was done already: before a stage changes, and with it what DDP makes equal on all ranks.

        Raises:
            FrozenDriftError: Something frozen has changed, or replicas differ.
        """
        if self._trained is not None:
            self._trained = None
            self._compare(trainer, pl_module)

    def _begin(self, pl_module: LightningModule) -> None:
        self._trained = _staging(pl_module).trained
        self._before = fingerprints(_still(pl_module))

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = _tensors(pl_module)
        now = fingerprints({name: tensors[name] for name in self._before})
        here = [name for name, digest in self._before.items() if now[name] != digest]
        drifted = list(dict.fromkeys(name for each in all_gather_object(here) for name in each))
        if drifted:
            raise FrozenDriftError(
                f"{_list(drifted)} changed while frozen. Something has written to it: look for code that trains it by itself, "
                "copies weights, or calls the backbone in train mode outside training_step"
            )
        if trainer.world_size > 1:
            moving = {n: p for n, p in pl_module.named_parameters() if n not in now and not isinstance(p, DTensor)}
            mine = {n: d for n, d in now.items() if not isinstance(tensors[n], DTensor)} | fingerprints(moving)
            found = all_gather_object(mine)
            differing = [name for name, digest in found[0].items() if any(other[name] != digest for other in found)]
            if differing:
                raise FrozenDriftError(
                    f"{_list(differing)} differs between the {trainer.world_size} ranks, so they no longer train one model. "
                    "Gradients that are not reduced do this: look for parameters that are used outside training_step"
                )


def _staging(pl_module: LightningModule) -> FreezePolicy:
    freeze_policy = getattr(pl_module, "freeze_policy", None)
    if not isinstance(freeze_policy, FreezePolicy):
        raise TypeError(f"FrozenGuard guards a TransferClassifier, not a {type(pl_module).__name__}")
    return freeze_policy


def _still(pl_module: LightningModule) -> dict[str, Tensor]:
    frozen = {name: p.detach() for name, p in pl_module.named_parameters() if not p.requires_grad}
    return frozen | {f"backbone.{name}": tensor for name, tensor in _staging(pl_module).frozen_tensors().items()}


def _tensors(pl_module: LightningModule) -> dict[str, Tensor]:
    return dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())


def _list(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
