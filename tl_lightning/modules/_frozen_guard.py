"""Proof that frozen tensors do not change and that ranks agree."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from tl_lightning.freezing import FreezePolicy
from tl_lightning.utils.distributed import all_gather_object
from tl_lightning.utils.hashing import fingerprints

_LISTED = 5


class FrozenDriftError(RuntimeError):
    """A frozen tensor has changed, or the ranks have different weights."""


class FrozenGuard(Callback):
    """Hash the frozen tensors when stages start to train, and compare the hashes when other stages do, or the fit ends.

    On several ranks, all parameters and frozen buffers must also be the same on each rank.

    Example:
        Python: ``trainer.fit(model)`` adds it for every :class:`tl_lightning.modules.TransferClassifier`.
        The command line adds it in the same way.

    Raises:
        FrozenDriftError: When stages change or the fit ends: a frozen tensor has changed, or ranks have other weights.
    """

    def __init__(self) -> None:
        self._trained: frozenset[str] | None = None
        self._hashes: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hash the tensors that are frozen at the start."""
        self._start_stage(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the hashes, and hash anew, once other stages train.

        Raises:
            FrozenDriftError: A frozen tensor has changed, or the ranks have different weights.
        """
        if self._trained != _freeze_policy(pl_module).unfrozen:
            self.end_stage(trainer, pl_module)
            self._start_stage(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the hashes at the end of the fit.

        Raises:
            FrozenDriftError: A frozen tensor has changed, or the ranks have different weights.
        """
        self.end_stage(trainer, pl_module)

    def end_stage(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the hashes, once for each stage: before other stages are unfrozen and DDP is wrapped again.

        Raises:
            FrozenDriftError: A frozen tensor has changed, or the ranks have different weights.
        """
        if self._trained is not None:
            self._trained = None
            self._compare(trainer, pl_module)

    def _start_stage(self, pl_module: LightningModule) -> None:
        self._trained = _freeze_policy(pl_module).unfrozen
        self._hashes = fingerprints(_frozen_tensors(pl_module))

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        now = fingerprints({name: tensors[name] for name in self._hashes})
        here = [name for name, digest in self._hashes.items() if now[name] != digest]
        drifted = list(dict.fromkeys(name for each in all_gather_object(here) for name in each))
        if drifted:
            raise FrozenDriftError(
                f"{_list(drifted)} changed while frozen, so some code has written to it: look for code that trains it "
                "by itself, copies weights, or calls the backbone in train mode outside training_step"
            )
        if trainer.world_size > 1:
            trained = {n: p for n, p in pl_module.named_parameters() if n not in now and not isinstance(p, DTensor)}
            mine = {n: d for n, d in now.items() if not isinstance(tensors[n], DTensor)} | fingerprints(trained)
            found = all_gather_object(mine)
            differing = [name for name, digest in found[0].items() if any(other[name] != digest for other in found)]
            if differing:
                raise FrozenDriftError(
                    f"{_list(differing)} differs between the {trainer.world_size} ranks, so they no longer train one "
                    "model. Gradients that are not reduced do this: look for parameters that are used outside "
                    "training_step"
                )


def _freeze_policy(pl_module: LightningModule) -> FreezePolicy:
    policy = getattr(pl_module, "freeze_policy", None)
    if not isinstance(policy, FreezePolicy):
        raise TypeError(f"FrozenGuard guards a TransferClassifier, not a {type(pl_module).__name__}")
    return policy


def _frozen_tensors(pl_module: LightningModule) -> dict[str, Tensor]:
    frozen = {name: p.detach() for name, p in pl_module.named_parameters() if not p.requires_grad}
    buffers = _freeze_policy(pl_module).frozen_tensors()
    return frozen | {f"backbone.{name}": tensor for name, tensor in buffers.items()}


def _list(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
