"""Closed-form heads are the same from images, from cached features and on two ranks."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tests.data.test_cached_features import cached
from tests.doubles import TinyBackbone, image_folder
from tests.ranks import run_on_ranks
from tests.staged import images, trainer
from tl_lightning.callbacks import EMA, StagedUnfreezing
from tl_lightning.heads import ClassMeanHead, HeadCallable, LogisticRegressionHead, MLPHead, NearestNeighbourHead
from tl_lightning.modules import FeatureCacheClassifier, LinearProbe
from tl_lightning.utils.hashing import fingerprint

HEADS: dict[str, HeadCallable] = {
    "logistic regression": LogisticRegressionHead,
    "logistic regression with given C": partial(LogisticRegressionHead, C=0.1),
    "nearest neighbours": partial(NearestNeighbourHead, neighbours=5),
    "class means": ClassMeanHead,
}


def fit(photos: str | Path, folder: Path, head: str, cache: Path | None, **options: Any) -> tuple[str, float]:
    backbone = TinyBackbone()
    model = FeatureCacheClassifier(backbone, 3, HEADS[head])
    data = images(photos, augment=False) if cache is None else cached(photos, cache, backbone)
    run = trainer(folder, **options)
    run.fit(model, data)
    return fingerprint(model.state_dict()), float(run.callback_metrics["val_accuracy"])


@pytest.mark.parametrize("head", HEADS)
def test_head_is_the_same_from_images_and_from_cached_features(head: str, photos: Path, tmp_path: Path) -> None:
    from_images = fit(photos, tmp_path, head, None)
    assert fit(photos, tmp_path, head, tmp_path / "cache") == from_images
    assert from_images[1] >= 0.5


def test_augmented_views_are_refused(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    data = cached(photos, tmp_path / "cache", backbone, views=2)
    with pytest.raises(
        ValueError, match=r"data\.views is 2, but the head is solved for on the images without augmentation"
    ):
        trainer(tmp_path).fit(FeatureCacheClassifier(backbone, 3), data)


def fit_all_heads(world: int, photos: str, folder: str) -> dict[str, tuple[str, float]]:
    options = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    return {head: fit(photos, Path(folder), head, Path(folder) / "cache", **options) for head in HEADS}


@pytest.mark.slow
def test_heads_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", {"ant": 12, "bee": 16, "cat": 14})
    assert len(images(photos).splits["train"].files) == 25  # odd, so that two ranks see one image twice
    one = run_on_ranks(__name__, "fit_all_heads", tmp_path / "one", world=1, photos=str(photos), folder=str(tmp_path))
    two = run_on_ranks(__name__, "fit_all_heads", tmp_path / "two", world=2, photos=str(photos), folder=str(tmp_path))
    assert two == [one[0], one[0]]


class BatchRecorder(pl.Callback):
    """Record the inputs and targets of each training batch."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.targets: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.rows.append(args[0].inputs)
        self.targets.append(args[0].target)


def test_logistic_regression_gives_the_probabilities_of_scikit_learn(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    model = FeatureCacheClassifier(backbone, 3, partial(LogisticRegressionHead, C=0.1, tolerance=1e-6))
    seen = BatchRecorder()
    trainer(tmp_path, seen).fit(model, cached(photos, tmp_path / "cache", backbone))
    assert isinstance(model.head, LogisticRegressionHead)
    standard = model.head.standardize.eval()(torch.cat(seen.rows))
    theirs = LogisticRegression(C=0.1, tol=1e-6).fit(standard.numpy(), torch.cat(seen.targets).numpy())
    probabilities = torch.from_numpy(theirs.predict_proba(standard.numpy()))
    found = model.head.linear(standard).softmax(1)
    torch.testing.assert_close(found.detach().double(), probabilities.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_checkpoint_of_a_closed_form_head_classifies_images(head: str, photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    model = FeatureCacheClassifier(backbone, 3, HEADS[head])
    best = ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_last=True)
    run = trainer(tmp_path, best, enable_checkpointing=True, max_epochs=7)
    run.fit(model, cached(photos, tmp_path / "cache", backbone))
    assert (run.current_epoch, run.global_step) == (1, 1)
    loaded = FeatureCacheClassifier.load_from_checkpoint(best.best_model_path)
    assert loaded.class_names == ("ant", "bee", "cat")
    pixels = torch.randn(5, 3, 16, 16)
    assert torch.equal(loaded(pixels), model.eval()(pixels))
    expected = run.test(model, images(photos), verbose=False)
    assert trainer(tmp_path).test(loaded, images(photos), verbose=False) == expected


def test_head_weights_load_into_a_linear_probe_and_back(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    model = FeatureCacheClassifier(backbone, 3)
    data = cached(photos, tmp_path / "cache", backbone)
    trainer(tmp_path).fit(model, data)
    probe = LinearProbe(backbone, 3)
    probe.load_state_dict(model.state_dict())
    pixels = torch.randn(5, 3, 16, 16)
    assert torch.equal(probe.eval()(pixels), model.eval()(pixels))
    trainer(tmp_path).fit(probe, data)
    model.load_state_dict(probe.state_dict())
    assert torch.equal(probe.eval()(pixels), model.eval()(pixels))


def test_chosen_penalty_is_printed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(photos, tmp_path, "logistic regression", None)
    assert "LogisticRegressionHead: C = " in capsys.readouterr().out


def test_trained_heads_averaging_unfreezing_and_few_images_are_refused(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    with pytest.raises(ValueError, match="MLPHead is trained step by step: use it with CustomHeadClassifier"):
        FeatureCacheClassifier(backbone, 3, MLPHead)
    with pytest.raises(ValueError, match="no weights to average"):
        trainer(tmp_path, EMA(0.9)).fit(FeatureCacheClassifier(backbone, 3), images(photos))
    with pytest.raises(ValueError, match="never trains its backbone"):
        trainer(tmp_path, StagedUnfreezing({1: "layer3"})).fit(FeatureCacheClassifier(backbone, 3), images(photos))
    few = image_folder(tmp_path / "few", {"ant": 4, "bee": 12})
    with pytest.raises(ValueError, match="too few for 5 folds"):
        trainer(tmp_path).fit(FeatureCacheClassifier(backbone, 2), images(few, val_fraction=0.1))


def test_resuming_within_the_only_pass_is_refused(photos: Path, tmp_path: Path) -> None:
    class SaveWithinPass(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if args[2] == 0:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    trainer(tmp_path, SaveWithinPass(), enable_checkpointing=False).fit(
        FeatureCacheClassifier(TinyBackbone(), 3), images(photos)
    )
    resumed = trainer(tmp_path)
    with pytest.raises(ValueError, match="resumed within its only pass"):
        resumed.fit(
            FeatureCacheClassifier(TinyBackbone(), 3),
            images(photos),
            ckpt_path=tmp_path / "within.ckpt",
            weights_only=True,
        )


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_precision_other_than_single_or_mixed_is_refused(precision: Any, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"precision is {precision}, but the head is solved for in single precision: use 32-true"
    ):
        trainer(tmp_path, precision=precision).fit(FeatureCacheClassifier(TinyBackbone(), 3), images(photos))
