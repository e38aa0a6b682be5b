"""A run on cached activations equals the run on images, bit for bit, and never reads stale activations."""

import io
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchvision.transforms import v2

from tests.doubles import TINY, Block, DropoutProbe, TinyBackbone, save_image
from tests.ranks import run_on_ranks
from tests.staged import SCHEDULE, images, trainer
from tl_lightning.backbones import Backbone, TorchvisionBackbone
from tl_lightning.batch import Batch
from tl_lightning.callbacks import EMA, StagedUnfreezing
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule
from tl_lightning.features import DamagedStoreError, content_keys
from tl_lightning.heads import ConvHead, MLPHead
from tl_lightning.modules import CustomHeadClassifier, LinearProbe, PartialFineTuning, TransferClassifier
from tl_lightning.utils.hashing import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")

Make = Callable[[Backbone], TransferClassifier]

TUNED = partial(PartialFineTuning, num_classes=3, lr=0.01, backbone_lr=0.005)
STRATEGIES: dict[str, tuple[Make, Callable[[], list[pl.Callback]], list[str]]] = {
    "linear probe": (lambda b: LinearProbe(b, 3, lr=0.01), list, ["head"]),
    "head with dropout": (lambda b: DropoutProbe(b, 3, lr=0.01), list, ["head"]),
    "MLP head": (lambda b: CustomHeadClassifier(b, 3, MLPHead), list, ["head"]),
    "head on the map": (lambda b: CustomHeadClassifier(b, 3, ConvHead), list, ["map"]),
    "partial": (lambda b: TUNED(b, unfreeze_from="layer2"), list, ["layer2"]),
    "partial, batch norm": (lambda b: TUNED(b, unfreeze_from="layer2", train_bn=True), list, ["layer2"]),
    "partial, from inside a stage": (lambda b: TUNED(b, unfreeze_from="layer2.norm"), list, ["layer2"]),
    "full": (lambda b: TUNED(b, unfreeze_from="stem"), list, ["stem"]),
    "staged": (
        lambda b: TUNED(b, unfreeze_from="layer1"),
        lambda: [StagedUnfreezing(SCHEDULE), EMA(0.5)],
        ["head", "layer3", "layer1"],
    ),
}


class Losses(pl.Callback):
    """Record the loss of each step, and the boundary of each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.served: dict[int, set[str | None]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        outputs, batch, _ = args
        assert isinstance(batch, Batch)
        self.losses.append(float(outputs["loss"]))
        self.served.setdefault(trainer.current_epoch, set()).add(batch.boundary)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        batch = args[1]
        if not trainer.sanity_checking:
            self.served.setdefault(trainer.current_epoch, set()).add(batch.boundary)


def cached(
    photos: str | Path, cache: Path, backbone: Backbone | None = None, **options: Any
) -> CachedFeaturesDataModule:
    folder = images(photos, augment=False, preprocessing=None)
    return CachedFeaturesDataModule(folder, backbone or TinyBackbone(), str(cache), **options)


def run(
    photos: Path, folder: Path, kind: str, cache: Path | None, resume: Path | None = None, **options: Any
) -> tuple[Losses, dict[str, float], str]:
    make, callbacks, _ = STRATEGIES[kind]
    torch.manual_seed(0)
    model = make(TinyBackbone())
    data = images(photos, augment=False) if cache is None else cached(photos, cache, model.backbone)
    losses = Losses()
    fit = trainer(folder, losses, *options.pop("more", ()), *callbacks(), **options)
    fit.fit(model, data, ckpt_path=resume, weights_only=True)
    scores = fit.test(model, data, verbose=False)[0]
    return losses, dict(scores), fingerprint(model.state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_the_cache_equals_a_run_on_images(strategy: str, photos: Path, tmp_path: Path) -> None:
    expected, scores, weights = run(photos, tmp_path, strategy, None)
    found, scores_found, weights_found = run(photos, tmp_path, strategy, tmp_path / "cache")
    assert found.losses == expected.losses
    assert (scores_found, weights_found) == (scores, weights)
    served = [found.served[epoch] for epoch in range(5)]
    boundaries = STRATEGIES[strategy][2]
    assert served == ([{"head"}, {"layer3"}, *([{"layer1"}] * 3)] if len(boundaries) > 1 else [set(boundaries)] * 5)
    stores = [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert sorted(stores) == sorted(f"TinyBackbone_{boundary}" for boundary in boundaries)


@pytest.mark.parametrize("strategy", ["head with dropout", "staged"])
def test_a_run_resumed_at_any_step_ends_with_the_same_weights(strategy: str, photos: Path, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=True)
    saving: dict[str, Any] = {"more": [steps], "enable_checkpointing": True}
    weights = run(photos, tmp_path, strategy, tmp_path / "cache", **saving)[2]
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 5 * 3
    for checkpoint in checkpoints:
        assert run(photos, tmp_path, strategy, tmp_path / "cache", checkpoint)[2] == weights, checkpoint


def test_views_are_served_in_turn(photos: Path, tmp_path: Path) -> None:
    class Inputs(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[int, bytes]] = []
            self.validated: list[bytes] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.seen.append({})

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            rows = zip(args[1].index.tolist(), args[1].inputs, strict=True)
            self.seen[-1] |= {index: row.numpy().tobytes() for index, row in rows}

        def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if not trainer.sanity_checking:
                self.validated.append(args[1].inputs.numpy().tobytes())

    def fit(cache: str, **options: Any) -> Inputs:
        backbone = TinyBackbone()
        inputs = Inputs()
        trainer(tmp_path, inputs).fit(LinearProbe(backbone, 3), cached(photos, tmp_path / cache, backbone, **options))
        return inputs

    plain, three = fit("cache"), fit("cache", views=3)
    assert all(epoch == plain.seen[0] for epoch in plain.seen)
    assert three.validated == plain.validated
    assert (three.seen[3], three.seen[4]) == (three.seen[0], three.seen[1])
    assert len({three.seen[view][0] for view in range(3)} | {plain.seen[0][0]}) == 4
    assert fit("again", views=3).seen == three.seen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_rows_train_and_report_their_rounding_error(
    dtype: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = TinyBackbone()
    model = LinearProbe(backbone, 3, lr=0.05)
    fit = trainer(tmp_path)
    fit.fit(model, cached(photos, tmp_path / "cache", backbone, dtype=dtype))
    assert f"; relative error by {dtype} " in capsys.readouterr().out.replace("\n", " ")
    assert float(fit.callback_metrics["val_accuracy"]) > 0.6


def on_ranks(world: int, photos: str, folder: str) -> list[Any]:
    found = []
    for cache in (None, Path(folder) / "cache"):
        losses, scores, weights = run(
            Path(photos), Path(folder), "staged", cache, devices=world, strategy="ddp" if world > 1 else "auto"
        )
        found.append([losses.losses, scores, weights])
    return found


def test_two_ranks_equal_their_runs_on_images(photos: Path, tmp_path: Path) -> None:
    first, second = run_on_ranks(__name__, "on_ranks", tmp_path / "out", photos=str(photos), folder=str(tmp_path))
    for uncached, stored in (first, second):
        assert stored == uncached
    assert first[0][1:] == second[0][1:]


def test_the_served_activations_are_those_of_the_classifiers_own_network(photos: Path, tmp_path: Path) -> None:
    """Not of another network that the data module was made with, nor of the weights before a checkpoint was loaded."""
    data = cached(photos, tmp_path / "cache", TinyBackbone(seed=0))
    fit = trainer(tmp_path, enable_checkpointing=False)
    fit.fit(LinearProbe(TinyBackbone(seed=0), 3), data)
    fit.save_checkpoint(tmp_path / "first.ckpt")

    other = LinearProbe(TinyBackbone(seed=1), 3)
    expected = trainer(tmp_path).test(other, images(photos, augment=False), verbose=False)
    assert trainer(tmp_path).test(other, data, verbose=False) == expected

    # The checkpoint brings other weights than the model had when the data were set up.
    again = trainer(tmp_path)
    scores = again.test(other, data, ckpt_path=tmp_path / "first.ckpt", weights_only=True, verbose=False)
    loaded = LinearProbe.load_from_checkpoint(tmp_path / "first.ckpt")
    assert scores == trainer(tmp_path).test(loaded, images(photos, augment=False), verbose=False)


def test_a_checkpoint_of_a_cached_run_classifies_images(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    model = TUNED(backbone, unfreeze_from="layer2")
    data = cached(photos, tmp_path / "cache", backbone)
    fit = trainer(tmp_path)
    fit.fit(model, data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    loaded = PartialFineTuning.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.class_names == ("ant", "bee", "cat")
    from_images = trainer(tmp_path).predict(loaded, images(photos))
    through_data = trainer(tmp_path).predict(model, data)
    assert from_images is not None
    assert through_data is not None
    assert sum(map(len, from_images)) == 41
    assert all(torch.equal(a, b) for a, b in zip(from_images, through_data, strict=True))


def test_changed_images_and_damaged_shards_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)

    def fit() -> str:
        backbone = TinyBackbone()
        trainer(tmp_path, max_epochs=1).fit(LinearProbe(backbone, 3), cached(root, tmp_path / "cache", backbone))
        return " ".join(capsys.readouterr().out.split())

    said = fit()
    assert "features: caching pooled features, 24 float32, of 41 images: 0.0 MB of " in said
    assert "features: 41 images in" in said
    assert "features:" not in fit()
    save_image(root / "ant" / "003.png", seed=77)
    said = fit()
    assert "; images: 1 changed (ant/003.png)" in said
    assert "features: 1 images in" in said

    shard = next((tmp_path / "cache").glob("*/*.npy"))
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedStoreError, match=shard.name):
        fit()
    shard.unlink()
    assert "images in" in fit()


def test_wrong_arguments_are_refused(photos: Path, tmp_path: Path) -> None:
    data = CachedFeaturesDataModule(images(photos, preprocessing=None), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has no backbone; pass backbone="):
        data.setup("fit")
    with pytest.raises(ValueError, match="cache_dir is ''; give a folder"):
        CachedFeaturesDataModule(images(photos), cache_dir="")
    with pytest.raises(ValueError, match="views is -1"):
        cached(photos, tmp_path, views=-1)
    with pytest.raises(ValueError, match="dtype is 'float8'; features are cached as one of float32, float16, bfloat16"):
        cached(photos, tmp_path, dtype="float8")


def test_batches_are_served_without_a_trainer(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone().eval()
    data = cached(photos, tmp_path / "cache", backbone)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    plain = images(photos)
    plain.setup("fit")
    expected = next(iter(plain.val_dataloader()))
    assert torch.equal(batch.inputs, backbone(expected.inputs))
    assert batch.boundary == "head"
    assert torch.equal(batch.target, expected.target)


def test_the_same_bits_are_cached_with_and_without_a_classifier(photos: Path, tmp_path: Path) -> None:
    rows = []
    for classified in (False, True):
        torch.manual_seed(0)
        backbone = TorchvisionBackbone("resnet18", weights=None, image_size=64).eval()
        if classified:
            LinearProbe(backbone, 3)
        data = cached(photos, tmp_path / str(classified), backbone)
        data.setup("fit")
        rows.append(torch.cat([batch.inputs for batch in data.val_dataloader()]))
    assert torch.equal(*rows)


def test_weights_loaded_after_setup_have_activations_of_their_own(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone(seed=0).eval()
    data = cached(photos, tmp_path / "cache", backbone)
    data.setup("fit")
    loader = data.val_dataloader()
    backbone.load_state_dict(TinyBackbone(seed=1).state_dict())
    plain = images(photos)
    plain.setup("fit")
    assert torch.equal(next(iter(loader)).inputs, backbone(next(iter(plain.val_dataloader())).inputs))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named(
    workers: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    lost = root / "bee" / "004.png"
    data = cached(root, tmp_path / "cache")
    data.images.num_workers = workers
    assert data.splits  # they are listed
    gone = lost.rename(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"cannot read the image '.*004\.png': No such file"):
        data.complete(["head"])
    gone.rename(lost)

    def hash_then_lose(paths: list[Path]) -> list[str]:
        keys = content_keys(paths)
        lost.unlink()
        return keys

    monkeypatch.setattr("tl_lightning.data._feature_cache.content_keys", hash_then_lose)
    with pytest.raises(ValueError, match=r"cannot read the image '.*004\.png': No such file"):
        data.complete(["head"])


def test_a_file_name_that_is_not_valid_text_is_printed_escaped(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    data = cached(root, tmp_path / "cache", TinyBackbone().eval())
    data.setup("fit")
    data.complete(["head"])
    strange = next(root.rglob("*.png")).with_name("\udcff.png")
    save_image(strange, seed=4711)
    again = cached(root, tmp_path / "cache", TinyBackbone().eval())
    again.setup("fit")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8", errors="strict"))
    again.complete(["head"])
    sys.stdout.flush()
    assert rb"\udcff.png" in out.getvalue()


def test_views_by_another_augmentation_are_computed_anew(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the two have the same ``repr``."""

    def folders(augment: Callable[[Tensor], Tensor]) -> set[str]:
        monkeypatch.setattr(ImageFolderDataModule, "augmentation", lambda self, preprocessing: lambda_(augment))
        data = cached(photos, tmp_path / "cache", TinyBackbone().eval(), views=1)
        data.setup("fit")
        data.complete(["head"])
        return {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}

    def lambda_(augment: Callable[[Tensor], Tensor]) -> v2.Compose:
        return v2.Compose([v2.Resize([16, 16]), v2.Lambda(augment), v2.ToDtype(torch.float32, scale=True)])

    first = folders(lambda image: image // 2)
    assert len(first) == 2  # as they are, and augmented
    assert folders(lambda image: image // 2) == first
    assert len(folders(lambda image: image // 3) - first) == 1
    with pytest.raises(ValueError, match="makes different views from the same seed"):
        folders(lambda image: image // 2 + time.time_ns() % 97)


def test_features_of_views_are_refused(photos: Path, tmp_path: Path) -> None:
    data = cached(photos, tmp_path / "cache", TinyBackbone().eval(), views=2)
    data.setup("fit")
    assert data.features("val", "head").shape == (len(data.splits["val"].files), 24)
    with pytest.raises(ValueError, match="training images are cached as 2 augmented views each"):
        data.features("train", "head")


def test_an_unknown_boundary_of_a_users_backbone_is_named(photos: Path, tmp_path: Path) -> None:
    data = cached(photos, tmp_path / "cache", Parameterless().eval())
    data.setup("fit")
    with pytest.raises(ValueError, match=r"unknown boundary 'layer9'; .*there are mean, map, head"):
        data.features("val", "layer9")


class Parameterless(Backbone):
    """Return the mean colour."""

    feature_dim = 3
    preprocessing = TINY
    stages = ("mean",)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_map(images).mean((2, 3))

    def forward_map(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def split(self, stage: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        ("mean",).index(stage)
        return torch.nn.Identity(), self


def test_a_backbone_without_parameters_trains_from_the_cache(photos: Path, tmp_path: Path) -> None:
    found = []
    for cache in (None, tmp_path / "cache"):
        torch.manual_seed(0)
        model = LinearProbe(Parameterless(), 3, lr=0.01)
        data = images(photos, augment=False) if cache is None else cached(photos, cache, model.backbone)
        fit = trainer(tmp_path)
        fit.fit(model, data)
        found.append((dict(fit.callback_metrics), fingerprint(model.state_dict())))
    assert found[0] == found[1]


def test_activations_of_a_patched_layer_are_computed_anew(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served() -> torch.Tensor:
        data = cached(photos, tmp_path / "cache", TinyBackbone().eval())
        data.setup("fit")
        return next(iter(data.val_dataloader())).inputs

    first = served()
    assert "the rows cached before" not in capsys.readouterr().out
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, inputs: forward(self, inputs) * 1.1)
    assert not torch.equal(served(), first)
    assert "the rows cached before differ in code, and are kept" in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    assert torch.equal(served(), first)
    assert capsys.readouterr().out == ""


def test_an_image_that_changes_during_extraction_is_not_cached(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)

    def hash_then_change(paths: list[Path]) -> list[str]:
        keys = content_keys(paths)
        save_image(root / "bee" / "004.png", seed=5)
        return keys

    monkeypatch.setattr("tl_lightning.data._feature_cache.content_keys", hash_then_change)
    backbone = TinyBackbone()
    with pytest.raises(ValueError, match=r"004\.png' changed while features were computed; run again"):
        trainer(tmp_path).fit(LinearProbe(backbone, 3), cached(root, tmp_path / "cache", backbone))
    assert not list(tmp_path.glob("cache/*/manifest.json"))
