"""Tuners of Lightning leave a run as it was, or are refused with the way that is right."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner.tuning import Tuner

from tests.doubles import TinyBackbone, image_folder
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import LinearProbe


class UsedRates(pl.Callback):
    """Note the rate of the head at each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        assert isinstance(pl_module, LinearProbe)
        self.rates.append(pl_module.used_lrs["head"])


def run(photos: Path, folder: Path, batch_size: int) -> tuple[pl.Trainer, LinearProbe, ImageFolderDataModule]:
    pl.seed_everything(1)
    model = LinearProbe(TinyBackbone(), 3)
    data = ImageFolderDataModule(
        str(photos), batch_size=batch_size, num_workers=0, preprocessing=model.backbone.preprocessing, seed=1
    )
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[UsedRates()],
        **options,  # type: ignore[arg-type]
    )
    return trainer, model, data


def rates(trainer: pl.Trainer) -> list[float]:
    return next(callback.rates for callback in trainer.callbacks if isinstance(callback, UsedRates))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("tuned") / "photos", {"ant": 12, "bee": 12, "cat": 12})


@pytest.mark.filterwarnings("ignore")
def test_run_after_the_search_for_a_batch_size_equals_one_that_was_given_this_size(
    photos: Path, tmp_path: Path
) -> None:
    trainer, model, data = run(photos, tmp_path, batch_size=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = Tuner(trainer).scale_batch_size(model, datamodule=data, init_val=4, max_trials=1, steps_per_trial=2)
    assert found == data.batch_size == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trainer.fit(model, data)

    given, expected, same = run(photos, tmp_path, batch_size=4)
    given.fit(expected, same)
    assert rates(trainer) == rates(given)
    assert max(rates(trainer)) == model.lr
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_search_for_a_learning_rate_is_refused_and_the_trainer_still_trains(photos: Path, tmp_path: Path) -> None:
    trainer, model, data = run(photos, tmp_path, batch_size=4)
    with pytest.raises(ValueError, match=r"75 times below the default.*compare rates on held-out images by tl-lightn"):
        Tuner(trainer).lr_find(model, datamodule=data)
    trainer.fit(model, data)
    assert max(rates(trainer)) == model.lr == 1e-3
