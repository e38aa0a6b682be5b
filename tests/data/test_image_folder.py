"""The data module of an image folder loads images, and resumes, as its options say."""

import gc
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.data.folders import data
from tests.doubles import save_image
from tests.staged import classifier, images, trainer
from tl_lightning.batch import Batch
from tl_lightning.data import ImageFolderDataModule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave some images for training"),
        ({"test_fraction": 1.1}, "test_fraction is 1.1"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"background": (0, 0, 256)}, "go from 0 to 255"),
    ],
)
def test_options_out_of_range_are_refused(photos: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(photos, **options)


def test_missing_preprocessing_is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"pass preprocessing=backbone\.preprocessing"):
        ImageFolderDataModule(str(photos)).setup("fit")


def test_augment_option_switches_augmentation(photos: Path) -> None:
    plain, mild = (data(photos, augment=augment).train_dataloader() for augment in (False, True))
    still: list[Tensor] = []
    moving: list[Tensor] = []
    for epoch in (0, 1):
        for each, seen in ((plain, still), (mild, moving)):
            each.sampler.set_epoch(epoch)
            images = {int(i): x for batch in each for i, x in zip(batch.index, batch.inputs, strict=True)}
            seen.append(torch.stack([images[i] for i in sorted(images)]))
    assert torch.equal(*still)
    assert not torch.equal(*moving)
    first = next(iter(data(photos).val_dataloader())).inputs
    assert torch.equal(first, next(iter(data(photos).val_dataloader())).inputs)


def test_prediction_takes_every_image_in_any_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPEG", "sub/deep/c.png", ".hidden/d.png"):
        save_image(tmp_path / name.replace("JPEG", "png"), 0)
    (tmp_path / "a.png").rename(tmp_path / "a.JPEG")
    module = data(tmp_path)
    with pytest.warns(UserWarning, match=r"hidden folders, whose images are skipped: '\.hidden' \(1 image\)"):
        module.setup("predict")
    assert module.predict_files == ["a.JPEG", "b.png", "sub/deep/c.png"]
    batch = next(iter(module.predict_dataloader()))
    assert batch.index.tolist() == [0, 1, 2]
    assert torch.unique(batch.target).tolist() == [-1]


class Indices(pl.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.seen.setdefault(trainer.current_epoch, []).extend(batch.index.tolist())


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_overfit_batches_are_the_same_in_every_epoch(photos: Path, tmp_path: Path) -> None:
    for few, same in ((2, True), (0, False)):
        seen = Indices()
        trainer(tmp_path, seen, max_epochs=2, overfit_batches=few, limit_train_batches=2).fit(
            classifier(), images(photos)
        )
        assert len(seen.seen[0]) == 16
        assert (seen.seen[0] == seen.seen[1]) is same


def test_interrupted_resume_leaves_no_workers_and_no_position(photos: Path, tmp_path: Path) -> None:
    """Unused loaders end their worker processes, and the position of one run does not reach the next."""
    module = data(photos, num_workers=1, val_fraction=0.3)
    others = set(multiprocessing.active_children())
    for _ in range(2):
        module.setup("fit")
        loader = module.train_dataloader()
        assert len(list(loader)) == len(loader)
        module._resume_position = loader.state_dict() | {"epoch": 0, "batches": 1}
        del loader
    gc.collect()
    assert len(set(multiprocessing.active_children()) - others) == 1, "only the loader in use keeps its worker"
    module.teardown("fit")
    assert set(multiprocessing.active_children()) <= others


def test_data_module_survives_pickling(photos: Path) -> None:
    module = data(photos)
    module.setup("fit")
    assert pickle.loads(pickle.dumps(module)).splits == module.splits  # noqa: S301 - our own
