from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.images import images
from tests.staged import EPOCHS, SCHEDULE, TRAINED, EpochRecorder, classifier, schedulers, trainer
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.modules import PartialFineTuning
from tl_lightning.utils.hashing import fingerprint

# The resumed runs write no checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
    # torch 2.15 warns of its own SequentialLR.
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
]


def run(
    photos: Path, folder: Path, resume: Path | None = None, **options: Any
) -> tuple[PartialFineTuning, EpochRecorder]:
    model = classifier(**{key: options.pop(key) for key in ("scheduler", "scheduler_interval") if key in options})
    callbacks: list[pl.Callback] = [StagedUnfreezing(options.pop("schedule", SCHEDULE)), recorder := EpochRecorder()]
    if resume is None:
        each_epoch = ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        each_step = ModelCheckpoint(folder, "step-{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks += [each_epoch, *([each_step] if options.pop("each_step", False) else [])]
    options["enable_checkpointing"] = resume is None
    torch.manual_seed(0 if resume is None else 99)
    trainer(folder, *callbacks, **options).fit(
        model, images(photos, augment=False), ckpt_path=resume, weights_only=True
    )
    return model, recorder


@pytest.mark.parametrize("name", schedulers(1))
def test_run_resumed_after_any_epoch_ends_with_the_same_bits(name: str, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheduler": schedulers(EPOCHS * 3)[name]}
    options["scheduler_interval"] = "step" if name == "OneCycleLR" else "epoch"
    model, recorder = run(photos, tmp_path, **options)
    assert recorder.trained == TRAINED
    checkpoints = sorted(tmp_path.glob("epoch-*.ckpt"))
    assert len(checkpoints) == EPOCHS
    for epoch, checkpoint in enumerate(checkpoints[:-1]):
        resumed, recorder = run(photos, tmp_path, checkpoint, **options)
        assert recorder.trained == TRAINED[epoch + 1 :], checkpoint.name
        assert fingerprint(resumed.state_dict()) == fingerprint(model.state_dict()), checkpoint.name


def test_run_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    model, _ = run(photos, tmp_path, each_step=True)
    checkpoints = sorted(tmp_path.glob("step-*.ckpt"))
    assert len(checkpoints) == 3 * EPOCHS
    for checkpoint in checkpoints:
        resumed, recorder = run(photos, tmp_path, checkpoint)
        assert recorder.trained == TRAINED[len(TRAINED) - len(recorder.trained) :], checkpoint.name
        assert fingerprint(resumed.state_dict()) == fingerprint(model.state_dict()), checkpoint.name


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_schedule_may_change_on_resume(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path, max_epochs=2)
    _, recorder = run(photos, tmp_path, tmp_path / "epoch-epoch=1.ckpt", schedule={0: "layer2", 3: "layer3"})
    assert recorder.trained == [("layer2", "layer3"), ("layer3",), ("layer3",)]
