from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.callbacks.images import images
from tests.doubles import image_folder
from tests.staged import SCHEDULE, classifier, trainer
from tl_lightning.backbones import TimmBackbone
from tl_lightning.callbacks import EMA, StagedUnfreezing
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import PartialFineTuning
from tl_lightning.utils.hashing import fingerprint


def test_average_keeps_frozen_weights_and_integer_buffers(tmp_path: Path) -> None:
    """Lightning's own average truncates 5,004 of 28,812 entries of a Swin's index buffers at this decay."""
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", weights=None)
    model = PartialFineTuning(backbone, 2, unfreeze_from="layers.3.blocks.1", lr=0.01)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    integers = {name: b.clone() for name, b in backbone.named_buffers() if not b.is_floating_point()}
    assert sum(buffer.numel() for buffer in integers.values()) > 10_000
    root = image_folder(tmp_path / "photos", {"ant": 4, "bee": 4})
    data = ImageFolderDataModule(str(root), batch_size=2, num_workers=0, preprocessing=backbone.preprocessing)
    trainer(tmp_path, EMA(decay=0.9999), max_epochs=1, limit_val_batches=0).fit(model, data)
    after = backbone.state_dict()
    buffers = dict(backbone.named_buffers())
    for name, buffer in integers.items():
        assert torch.equal(buffers[name], buffer), name
    moved = {name for name, parameter in backbone.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved == {name for name, p in backbone.named_parameters() if p.requires_grad}
    for name, tensor in before.items():
        assert name in moved or torch.equal(after[name], tensor), name


def test_validated_score_is_that_of_the_saved_average(photos: Path, tmp_path: Path) -> None:
    model = classifier(lr=0.05)
    run = trainer(tmp_path, EMA(decay=0.5), StagedUnfreezing(SCHEDULE), enable_checkpointing=True)
    run.fit(model, images(photos))
    score = float(run.callback_metrics["val_loss"])
    assert run.checkpoint_callback is not None
    again = PartialFineTuning.load_from_checkpoint(run.checkpoint_callback.best_model_path)  # type: ignore[attr-defined]
    checked = trainer(tmp_path).validate(again, images(photos), verbose=False)[0]["val_loss"]
    assert checked == pytest.approx(score, rel=1e-6)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_best_checkpoint_scored_after_the_fit_is_the_average(stage: str, photos: Path, tmp_path: Path) -> None:
    """Lightning's own callback restores the weights of the last step, so that these are scored instead of the file."""
    model = classifier(lr=0.05)
    run = trainer(tmp_path, EMA(decay=0.9), enable_checkpointing=True)
    run.fit(model, images(photos))
    assert run.checkpoint_callback is not None
    best = str(run.checkpoint_callback.best_model_path)  # type: ignore[attr-defined]
    scores = getattr(run, stage)(model, images(photos), ckpt_path=best, weights_only=True, verbose=False)
    again = PartialFineTuning.load_from_checkpoint(best)
    assert scores == getattr(trainer(tmp_path), stage)(again, images(photos), verbose=False)


def test_resuming_a_complete_run_gives_the_average(photos: Path, tmp_path: Path) -> None:
    ends = []
    for resume in (None, tmp_path / "end.ckpt"):
        model = classifier(lr=0.05)
        run = trainer(tmp_path, EMA(0.9), max_epochs=2)
        run.fit(model, images(photos), ckpt_path=resume, weights_only=True)
        if resume is None:
            run.save_checkpoint(tmp_path / "end.ckpt")
        ends.append(fingerprint(model.state_dict()))
    assert ends[0] == ends[1]


def test_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay is 1\.5; it must be at least 0 and below 1"):
        EMA(decay=1.5)


def test_checkpoints_of_weights_alone_are_refused(photos: Path, tmp_path: Path) -> None:
    alone = pl.callbacks.ModelCheckpoint(save_weights_only=True)
    run = trainer(tmp_path, EMA(), alone, enable_checkpointing=True)
    with pytest.raises(ValueError, match="save_weights_only=True"):
        run.fit(classifier(), images(photos))


def test_reused_callback_starts_a_new_average(photos: Path, tmp_path: Path) -> None:
    average = EMA(decay=0.5)
    ends = []
    for _ in range(2):
        model = classifier(lr=0.05)
        trainer(tmp_path, average, max_epochs=2).fit(model, images(photos))
        ends.append(fingerprint(model.state_dict()))
    assert ends[0] == ends[1]
    assert ends[0] != fingerprint(classifier().state_dict())


class SaveEveryBatch(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"{number:02}.ckpt", weights_only=False)


def test_run_resumed_between_accumulated_batches_ends_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    """Batch norm statistics of the live model are those of the last optimizer step, too."""

    def fit(resume: Path | None, *callbacks: pl.Callback) -> str:
        model = classifier(lr=0.05, train_bn=True)
        run = trainer(tmp_path, EMA(decay=0.5), *callbacks, max_epochs=3, accumulate_grad_batches=2)
        run.fit(model, images(photos), ckpt_path=resume, weights_only=True)
        return fingerprint(model.state_dict())

    whole = fit(None, SaveEveryBatch(tmp_path))
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 9
    for checkpoint in checkpoints[:-1]:
        assert fit(checkpoint) == whole, checkpoint.name
