"""A loss that is not finite stops the run before the optimizer step; weights that are not finite are never saved."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.doubles import TinyBackbone
from tests.staged import images, trainer
from tl_lightning.callbacks import FiniteGuard
from tl_lightning.callbacks.model_checkpoint import BestCheckpoint, RunCheckpoint
from tl_lightning.cli.exit_codes import explain_failure
from tl_lightning.modules import PartialFineTuning

PER_EPOCH = 3
"""Batches of eight images in an epoch."""


class Diverging(PartialFineTuning):
    """Add a value to the losses of some training batches; a gradient factor spoils the gradients alone."""

    value = math.nan
    batches: tuple[int, ...] = ()
    gradient = 1.0
    seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen += 1
        return self.spoil(loss) if self.seen in self.batches else loss

    def spoil(self, loss: Tensor) -> Tensor:
        if self.gradient != 1.0:
            loss.register_hook(lambda gradient: gradient * self.gradient)  # type: ignore[no-untyped-call]
            return loss
        return loss + self.value


def diverging(value: float = math.nan, batches: tuple[int, ...] = (), gradient: float = 1.0) -> "Diverging":
    torch.manual_seed(5)
    model = Diverging(TinyBackbone(), num_classes=3, unfreeze_from="layer3", lr=0.01, backbone_lr=0.002)
    model.value, model.batches, model.gradient = value, batches, gradient
    return model


class States(pl.Callback):
    """Record the weights after each batch, and at the end of a run that fails."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.failed: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.after.append(_weights(pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.failed = _weights(pl_module)


def _weights(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_stops_the_run_before_its_step(value: float, photos: Path, tmp_path: Path) -> None:
    states, last = States(), RunCheckpoint(tmp_path, "last")
    run = trainer(tmp_path, states, last, enable_checkpointing=True)
    with pytest.raises(FloatingPointError) as caught:
        run.fit(diverging(value, batches=(PER_EPOCH + 2,)), images(photos))
    message = str(caught.value)
    assert f"the loss is {value} in epoch 1, at step {PER_EPOCH + 1}" in message
    assert "(learning rates: head 0.00891, layer3 0.00178)" in message
    assert f"the last good checkpoint is '{tmp_path / 'last.ckpt'}'" in message
    assert "FiniteGuard(skip_steps=True)" in message
    assert explain_failure(caught.value, has_begun=True) == (message, 1), "the command line would print a traceback"
    assert len(states.after) == PER_EPOCH + 1
    assert _same(states.failed, states.after[-1]), "the step was made"


def test_first_batch_of_an_accumulation_stops_the_run_before_the_step(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, accumulate_grad_batches=2)
    message = r"the loss is nan in epoch 0, at step 0 .* there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        run.fit(diverging(batches=(1,)), images(photos))
    assert run.global_step == 0


def test_skipped_step_changes_neither_weights_nor_buffers_and_is_said(photos: Path, tmp_path: Path) -> None:
    states = States()
    model = diverging(batches=(2,))
    with pytest.warns(UserWarning, match=r"the loss is nan in epoch 0, at step 1 .*: this step is skipped"):
        trainer(tmp_path, states, FiniteGuard(skip_steps=True), max_epochs=1).fit(model, images(photos))
    assert _same(states.after[1], states.after[0])
    assert not _same(states.after[2], states.after[1])


def test_batch_norm_statistics_of_a_skipped_step_are_put_back(photos: Path, tmp_path: Path) -> None:
    def spoil(run: pl.Trainer, module: Diverging) -> None:
        if module.seen == 2:
            module.backbone.get_buffer(name).fill_(math.nan)  # as activations that overflow would

    name = next(n for n, _ in TinyBackbone().named_buffers() if n.endswith("running_mean") and "layer3" in n)
    model, spoiler = diverging(batches=(2,)), pl.callbacks.LambdaCallback(on_after_backward=spoil)
    with pytest.warns(UserWarning, match="this step is skipped"):
        trainer(tmp_path, spoiler, FiniteGuard(skip_steps=True), max_epochs=1).fit(model, images(photos))
    assert model.backbone.get_buffer(name).isfinite().all()


def test_weights_spoiled_by_an_infinite_gradient_never_replace_a_good_checkpoint(photos: Path, tmp_path: Path) -> None:
    last = RunCheckpoint(tmp_path, "last")
    model = diverging(batches=(2 * PER_EPOCH,), gradient=math.inf)  # the last step of the second epoch
    run = trainer(tmp_path, last, enable_checkpointing=True, limit_val_batches=0)
    with pytest.raises(FloatingPointError) as caught:
        run.fit(model, images(photos))
    assert "the weights backbone." in str(caught.value)
    assert "are not finite at the end of epoch 1" in str(caught.value)
    assert f"the last good checkpoint is '{tmp_path / 'last.ckpt'}'" in str(caught.value)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())


def test_checkpoint_with_spoiled_weights_is_not_called_good(photos: Path, tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, "{step}", "step", mode="max", save_top_k=-1, every_n_train_steps=1)
    run = trainer(tmp_path, every, enable_checkpointing=True)
    with pytest.raises(FloatingPointError, match=r"at step 2 .*the last good checkpoint is '.*step=1\.ckpt'"):
        run.fit(diverging(batches=(2,), gradient=math.nan), images(photos))
    assert (tmp_path / "step=2.ckpt").is_file()


class DivergingValidation(PartialFineTuning):
    """Have a validation loss that is not finite in epochs 0 and 2."""

    def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = super().compute_loss(logits, target)
        within = self.trainer.validating and self.trainer.current_epoch in (0, 2)
        return loss + math.nan if within else loss


@pytest.mark.parametrize("monitor", ["val_f1", "val_loss"])
def test_epoch_whose_validation_loss_is_not_finite_is_never_the_best_and_is_said(
    monitor: str, photos: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    model = DivergingValidation(TinyBackbone(), num_classes=3, unfreeze_from="layer3", lr=0.01)
    best = BestCheckpoint(tmp_path, "best", monitor, "max" if monitor == "val_f1" else "min")
    run = trainer(tmp_path, best, max_epochs=3, enable_checkpointing=True)
    with pytest.warns(
        UserWarning, match=r"val_loss is nan in epoch [02], at step [39]; best.ckpt never keeps such an epoch"
    ):
        run.fit(model, images(photos))
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 1
