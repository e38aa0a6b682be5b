"""A changed frozen tensor ends the run with an error, and frozen stages compute the same in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.doubles import TinyBackbone
from tests.staged import SCHEDULE, classifier, images, trainer
from tl_lightning.backbones import Backbone, TimmBackbone
from tl_lightning.callbacks import FrozenDriftError, FrozenGuard, StagedUnfreezing
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import LinearProbe, PartialFineTuning


class Drift(pl.Callback):
    """Add 1 to the first number of a tensor after each batch of one epoch."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name = name
        self.epoch = epoch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            tensor = pl_module.state_dict()[self.name]
            tensor[(0,) * tensor.ndim] += 1


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("backbone.model.stem.conv.weight", 0),
        ("backbone.model.layer3.conv.weight", 0),
        ("backbone.model.layer1.norm.running_mean", 1),
        ("backbone.model.layer3.norm.running_var", 3),
        ("backbone.model.layer3.norm.num_batches_tracked", 4),
    ],
)
def test_changed_frozen_tensor_stops_the_run_and_is_named(name: str, epoch: int, photos: Path, tmp_path: Path) -> None:
    callbacks = [StagedUnfreezing(SCHEDULE), Drift(name, epoch)]
    run = trainer(tmp_path, *callbacks)
    with pytest.raises(FrozenDriftError, match=f"^{name} changed while frozen"):
        run.fit(classifier(), images(photos))
    assert run.current_epoch <= epoch + 2


def test_trained_tensors_do_not_stop_the_run(photos: Path, tmp_path: Path) -> None:
    trainer(tmp_path, StagedUnfreezing({1: "layer1"})).fit(classifier(train_bn=True), images(photos))
    trainer(tmp_path).fit(LinearProbe(TinyBackbone(), 3), images(photos))


def test_guard_is_added_to_every_run_exactly_once(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, FrozenGuard())
    for _ in range(2):
        run.fit(LinearProbe(TinyBackbone(), 3), images(photos))
    assert sum(isinstance(callback, FrozenGuard) for callback in run.callbacks) == 1  # type: ignore[attr-defined]
    assert "will override existing callbacks" not in caplog.text


class CallsTrain(pl.Callback):
    """Set train mode after each batch, as a user may do by hand."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        pl_module.get_submodule("backbone").train()
        pl_module.train()


NETWORKS: dict[str, tuple[Callable[[], Backbone], str]] = {
    "batch norm and dropout": (TinyBackbone, "layer3"),
    "ConvNeXt with stochastic depth": (lambda: TimmBackbone("test_convnext", weights=None), "stages.3"),
    "ViT": (lambda: TimmBackbone("test_vit", weights=None), "blocks.4"),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["mode left alone", "train mode set by hand"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_frozen_stages_keep_their_bits_and_compute_the_same_in_training(
    kind: str, by_hand: bool, photos: Path, tmp_path: Path
) -> None:
    make, first = NETWORKS[kind]
    backbone = make()
    prefix, suffix = backbone.split(first)
    before = {name: tensor.clone() for name, tensor in prefix.state_dict().items()}
    trainable_before = {name: tensor.clone() for name, tensor in suffix.named_parameters()}
    model = PartialFineTuning(backbone, 3, unfreeze_from=first, lr=0.01)
    data = ImageFolderDataModule(
        str(photos), batch_size=8, num_workers=0, augment=False, preprocessing=backbone.preprocessing
    )
    seen: list[Tensor] = []
    run_suffix = model.run_suffix

    def record(part: Any, inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return run_suffix(part, inputs)

    model.run_suffix = record  # type: ignore[method-assign, assignment]  # records the output of the frozen stages
    trainer(tmp_path, *([CallsTrain()] if by_hand else []), max_epochs=2).fit(model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prefix.state_dict().items())
    assert all(not torch.equal(tensor, trainable_before[name]) for name, tensor in suffix.named_parameters())
    model.eval()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    with torch.no_grad():
        features = [prefix(batch.inputs) for batch in loader]
    training = [inputs for inputs in seen if len(inputs) != 4][: len(features)]
    assert all(torch.equal(given, expected) for given, expected in zip(training, features, strict=True))
    assert not any(inputs.requires_grad for inputs in seen), "the frozen stages built an autograd graph"
