from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.callbacks.images import images
from tests.staged import EPOCHS, EpochRecorder, classifier, schedulers, trainer
from tl_lightning.batch import Batch
from tl_lightning.callbacks import StagedUnfreezing

# torch 2.15 warns of its own SequentialLR.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


def test_each_stage_warms_up_from_its_own_first_epoch(photos: Path, tmp_path: Path) -> None:
    """The learning rates that it scales are those of the user's scheduler."""
    recorder = EpochRecorder()
    callback = StagedUnfreezing({1: "layer3", 3: "layer2", 4: "head", 5: "layer2"}, warmup_epochs=1.0)
    model = classifier(
        lr=1.0, backbone_lr=0.5, layer_decay=0.5, unfreeze_from="layer2", scheduler=schedulers(0)["StepLR"]
    )
    run = trainer(tmp_path, callback, recorder, max_epochs=6)
    run.fit(model, images(photos))
    table = [[round(step[name], 4) for name in ("head", "layer3", "layer2")] for step in recorder.steps]
    third = 1 / 3
    expected = [
        # head   layer3          layer2
        *[(1.0, 0.0, 0.0)] * 3,
        *((1.0, 0.5 * share, 0.0) for share in (third, 2 * third, 1.0)),
        *[(0.5, 0.25, 0.0)] * 3,
        *((0.5, 0.25, 0.125 * share) for share in (third, 2 * third, 1.0)),
        *[(0.25, 0.0, 0.0)] * 3,
        *((0.25, 0.125 * share, 0.0625 * share) for share in (third, 2 * third, 1.0)),
    ]
    assert table == [pytest.approx(row, abs=1e-4) for row in expected]
    assert [group["lr"] for group in run.optimizers[0].param_groups[::2]] == [0.125, 0.0625, 0.03125], (
        "the callback has restored the rates"
    )
    logged = {name: float(run.callback_metrics[f"lr-{name}"]) for name in ("head", "layer3", "layer2")}
    assert logged == pytest.approx({"head": 0.25, "layer3": 0.125, "layer2": 0.0625}), (
        "the logged rate is the one that was used"
    )


class Stream(torch.utils.data.IterableDataset[Batch]):
    """Three batches of a length that is not known beforehand."""

    def __iter__(self) -> Iterator[Batch]:
        for number in range(3):
            images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(number))
            yield Batch(images, torch.arange(4) % 3, torch.arange(4), None)


def test_warm_up_counts_whole_epochs_if_their_length_is_unknown(tmp_path: Path) -> None:
    recorder = EpochRecorder()
    model = classifier(lr=1.0, backbone_lr=0.5, scheduler=schedulers(0)["none"], unfreeze_from="layer3")
    run = trainer(tmp_path, StagedUnfreezing({1: "layer3"}, warmup_epochs=2.0), recorder, max_epochs=3)
    stream: Any = torch.utils.data.DataLoader(Stream(), batch_size=None)
    run.fit(model, stream, stream)
    assert [step["layer3"] for step in recorder.steps] == [0.0] * 3 + [0.25] * 3 + [0.5] * 3


@pytest.mark.parametrize("name", schedulers(1))
def test_schedulers_keep_the_ratio_between_groups(name: str, photos: Path, tmp_path: Path) -> None:
    interval: Any = "step" if name == "OneCycleLR" else "epoch"
    model = classifier(layer_decay=0.5, scheduler=schedulers(EPOCHS * 3)[name], scheduler_interval=interval)
    seen: list[list[float]] = []

    class NoteRates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups[::2]])

    trainer(tmp_path, NoteRates()).fit(model, images(photos))
    assert len(seen) == EPOCHS * 3
    for head, layer3, layer2, layer1 in seen:
        assert (layer3 / head, layer2 / head, layer1 / head) == pytest.approx((0.5, 0.25, 0.125), rel=1e-6)


def test_scheduler_that_loses_the_ratio_is_refused(photos: Path, tmp_path: Path) -> None:
    class Flat(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float | torch.Tensor]:
            return [0.1 for _ in self.base_lrs]

    with pytest.raises(ValueError, match=r"Flat gives every group the learning rate 0\.1, but they had head 0\.01"):
        trainer(tmp_path).fit(classifier(scheduler=Flat), images(photos))
