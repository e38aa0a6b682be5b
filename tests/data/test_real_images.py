"""On real images and real weights, training on cached activations equals training on images."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.data.test_cached_features import Losses
from tests.staged import trainer
from tl_lightning.backbones import EfficientNetLite
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule, SolarCellsDataModule
from tl_lightning.modules import LinearProbe, PartialFineTuning, TransferClassifier

OPTIONS: dict[str, Any] = {"lr": 3e-3, "backbone_lr": 3e-4}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a hundred images of each class."""
    everything = SolarCellsDataModule(root=str(tmp_path_factory.mktemp("all") / "cells"))
    everything.prepare_data()
    root = tmp_path_factory.mktemp("some")
    for folder in Path(everything.root).iterdir():
        files = sorted(folder.iterdir())
        root.joinpath(folder.name).mkdir()
        for file in files[:: len(files) // 100][:100]:
            shutil.copy(file, root / folder.name)
    return root


def make(kind: str) -> tuple[TransferClassifier, list[pl.Callback]]:
    torch.manual_seed(0)
    backbone = EfficientNetLite()
    if kind == "probe":
        return LinearProbe(backbone, 2), []
    model = PartialFineTuning(backbone, 2, unfreeze_from="blocks.5", **OPTIONS)
    return model, [StagedUnfreezing({1: "conv_head", 2: "blocks.5"})] if kind == "staged" else []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["probe", "partial", "staged"])
def test_training_on_cached_activations_equals_training_on_images(kind: str, cells: Path, tmp_path: Path) -> None:
    curves, scores = [], []
    for cache in (False, True):
        model, callbacks = make(kind)
        folder = ImageFolderDataModule(str(cells), augment=False, preprocessing=model.backbone.preprocessing)
        data = CachedFeaturesDataModule(folder, cache_dir=str(tmp_path / "cache")) if cache else folder
        losses = Losses()
        run = trainer(tmp_path, losses, *callbacks, max_epochs=3)
        run.fit(model, data)
        curves.append(torch.tensor(losses.losses))
        scores.append(run.test(model, data, verbose=False)[0])
    print(kind, float(((curves[0] - curves[1]) / curves[0]).abs().max()), scores)
    assert curves[0][0] > curves[0][-5:].mean() + 0.05  # it learns
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)
    assert scores[0]["test_accuracy"] == scores[1]["test_accuracy"]
    assert scores[0]["test_f1"] == scores[1]["test_f1"]
