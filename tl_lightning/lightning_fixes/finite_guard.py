"""Stop a run whose loss is not finite before the optimizer step spoils the weights.

Lightning trains on with such weights, and saves them. Its ``terminate_on_nan`` was removed
(https://github.com/Lightning-AI/pytorch-lightning/pull/12553). ``detect_anomaly`` slows training several times, and
overlooks an infinite loss. Needed for Lightning 2.6. This file can be deleted when the trainer checks the loss before
each step, on all ranks together, without waiting for the GPU.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tl_lightning import optim
from tl_lightning.utils.distributed import all_gather_object, rank_and_world_size


class NotFiniteError(FloatingPointError):
    """The loss or the weights of a run are not finite; all ranks raise it together."""


class FiniteGuard(Callback):
    """Stop a run whose loss, or at the end of an epoch a weight, is infinite or not a number.

    The run stops before the optimizer step, on all ranks together, so that every checkpoint holds finite weights. An
    infinite gradient alone is no reason to stop before a step, since mixed precision skips such steps by itself.

    Example:
        Every run has this callback. To skip steps instead of stopping: Python:
        ``Trainer(callbacks=[FiniteGuard(skip_steps=True)])``; command line:
        ``--trainer.callbacks+ FiniteGuard --trainer.callbacks.skip_steps true``.

    Args:
        skip_steps: Skip the optimizer step of such a loss, with a warning, and go on.
    """

    def __init__(self, skip_steps: bool = False) -> None:
        self.skip_steps = skip_steps
        self._losses: list[Tensor] = []  # since the last optimizer step
        self._check: _Check | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []  # each with its copy

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the losses of an earlier run."""
        self._losses, self._check, self._buffers = [], None, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the buffers before the first batch of a step that may be skipped, since a forward pass changes them."""
        if self.skip_steps and not self._losses:
            self._buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss; at the last batch of a step, start to check the losses of this step."""
        self._losses.append(loss.detach())
        if not trainer.fit_loop._should_accumulate():
            self._check = _Check(self._losses)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop the run, or skip the step, if a loss of this step is not finite on any rank.

        Raises:
            NotFiniteError: A loss is not finite, and steps are not skipped.
        """
        if self._check is None:
            return
        finite, losses = self._check.passed(), self._losses
        self._check, self._losses = None, []
        if finite:
            return
        every = trainer.accumulate_grad_batches
        found = all_gather_object([float(loss) * every for loss in losses if not loss.isfinite()])
        rank, values = next((rank, values) for rank, values in enumerate(found) if values)
        where = f" on rank {rank}" if len(found) > 1 else ""
        text = (
            f"the loss is {values[0]}{where} in epoch {trainer.current_epoch}, at step {trainer.global_step} "
            f"(learning rates: {_learning_rates(optimizer)})"
        )
        if not self.skip_steps:
            raise NotFiniteError(
                f"{text}; the run stops before this step, and {_last_good_checkpoint(trainer)}. Start a new run with a "
                "lower learning rate, or skip such steps: FiniteGuard(skip_steps=True) among the trainer's callbacks, "
                "--trainer.callbacks+ FiniteGuard --trainer.callbacks.skip_steps true on the command line"
            )
        rank_zero_warn(f"{text}: this step is skipped")
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, copy in self._buffers:
                buffer.copy_(copy)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a validation loss that is not finite."""
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn == "fit" and loss is not None and not loss.isfinite():
            rank_zero_warn(
                f"val_loss is {float(loss)} in epoch {trainer.current_epoch}, at step {trainer.global_step}; best.ckpt "
                "never keeps such an epoch"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights before the checkpoint of the epoch replaces a good one.

        Raises:
            NotFiniteError: A weight is not finite.
        """
        tensors: list[tuple[str, Tensor]] = [
            (name, parameter) for name, parameter in pl_module.named_parameters() if parameter.requires_grad
        ]
        tensors += [(name, buffer) for name, buffer in pl_module.named_buffers() if buffer.is_floating_point()]
        flags = [_local(tensor).isfinite().all() for _, tensor in tensors]
        if trainer.strategy.reduce_boolean_decision(not flags or bool(torch.stack(flags).all())):
            return
        names = [name for (name, _), finite in zip(tensors, flags, strict=True) if not finite]
        raise NotFiniteError(
            f"the weights {', '.join(names[:3]) or 'of another rank'}{' and others' if len(names) > 3 else ''} are not "
            f"finite at the end of epoch {trainer.current_epoch}; "
            f"{_last_good_checkpoint(trainer)}. Start a new run with a lower learning rate"
        )


class _Check:
    """Check losses on all ranks while the backward pass runs.

    On a GPU, a stream of its own copies the result to the host. Reading it waits for the forward pass only, while the
    GPU works on the backward pass, so the check does not leave the GPU idle.
    """

    def __init__(self, losses: list[Tensor]) -> None:
        device = losses[0].device
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._flag, self._work = _reduced_flag(losses)
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._on_device, self._work = _reduced_flag(losses)  # kept until the copy is made
            if self._work is not None:
                self._work.wait()  # the stream waits, not the host
            self._flag = torch.empty_like(self._on_device, device="cpu", pin_memory=True)
            self._flag.copy_(self._on_device, non_blocking=True)
            self._event = stream.record_event()

    def passed(self) -> bool:
        """Wait for the result, and return whether all losses of all ranks are finite."""
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        return not bool(self._flag)


def _reduced_flag(losses: list[Tensor]) -> tuple[Tensor, dist.Work | None]:
    """Return a flag that is 1 where a loss of any rank is not finite, and the work that reduces it."""
    flag = (~torch.stack(losses).isfinite()).any().int()
    if rank_and_world_size()[1] == 1:
        return flag, None
    return flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _learning_rates(optimizer: Optimizer) -> str:
    rates = {
        optim.stage_of_group(group): float(group["lr"])
        for group in optimizer.param_groups
        if any(isinstance(p, nn.Parameter) and p.requires_grad for p in group["params"])
    }
    return ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())


def _last_good_checkpoint(trainer: Trainer) -> str:
    """Name the newest checkpoint of this run whose weights are finite."""
    saves = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    names = {name for save in saves for name in (save.best_model_path, save.last_model_path, *save.best_k_models)}
    files = [Path(name) for name in names if name and Path(name).is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        if all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
            return f"the last good checkpoint is {str(file)!r}"
    return "there is no good checkpoint" if files else "there is no checkpoint yet"
