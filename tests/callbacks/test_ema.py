from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.doubles import image_folder
from tests.staged import SCHEDULE, classifier, images, trainer
from tl_lightning.backbones import TimmBackbone
from tl_lightning.callbacks import EMA, StagedUnfreezing
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import PartialFineTuning
from tl_lightning.utils.hashing import fingerprint


def test_frozen_weights_and_integer_buffers_of_a_swin_stay(tmp_path: Path) -> None:
    """Lightning's own average truncates 5,004 of 28,812 entries of the index at this decay."""
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", weights=None)
    model = PartialFineTuning(backbone, 2, unfreeze_from="layers.3.blocks.1", lr=0.01)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    index = [name for name, tensor in before.items() if not tensor.is_floating_point()]
    whole = sum(buffer.numel() for name, buffer in backbone.named_buffers() if not buffer.is_floating_point())
    assert whole > 10_000
    integers = {name: b.clone() for name, b in backbone.named_buffers() if not b.is_floating_point()}
    root = image_folder(tmp_path / "photos", {"ant": 4, "bee": 4})
    data = ImageFolderDataModule(str(root), batch_size=2, num_workers=0, preprocessing=backbone.preprocessing)
    trainer(tmp_path, EMA(decay=0.9999), max_epochs=1, limit_val_batches=1).fit(model, data)
    after = backbone.state_dict()
    for name in index:
        assert torch.equal(after[name], before[name]), name
    for name, buffer in backbone.named_buffers():
        if not buffer.is_floating_point():
            assert torch.equal(buffer, integers[name]), name
    moved = {name for name, parameter in backbone.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved == {name for name, p in backbone.named_parameters() if p.requires_grad}
    for name, tensor in before.items():
        assert name in moved or torch.equal(after[name], tensor), name


def test_average_is_validated_and_saved(photos: Path, tmp_path: Path) -> None:
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
def test_score_after_fit_is_that_of_the_saved_average(stage: str, photos: Path, tmp_path: Path) -> None:
    """Lightning's own callback puts the weights of the last step back, and they are tested in place of those in the file."""
    model = classifier(lr=0.05)
    run = trainer(tmp_path, EMA(decay=0.9), enable_checkpointing=True)
    run.fit(model, images(photos))
    assert run.checkpoint_callback is not None
    best = str(run.checkpoint_callback.best_model_path)  # type: ignore[attr-defined]
    scores = getattr(run, stage)(model, images(photos), ckpt_path=best, weights_only=True, verbose=False)
    again = PartialFineTuning.load_from_checkpoint(best)
    assert scores == getattr(trainer(tmp_path), stage)(again, images(photos), verbose=False)


def test_complete_run_that_is_resumed_is_the_average(photos: Path, tmp_path: Path) -> None:
    ends = []
    for resume in (None, tmp_path / "end.ckpt"):
        model = classifier(lr=0.05)
        run = trainer(tmp_path, EMA(0.9), max_epochs=2)
        run.fit(model, images(photos), ckpt_path=resume, weights_only=True)
        if resume is None:
            run.save_checkpoint(tmp_path / "end.ckpt")
        ends.append(fingerprint(model.state_dict()))
    assert ends[0] == ends[1]


def test_wrong_decay() -> None:
    with pytest.raises(ValueError, match=r"decay is 1\.5; it is a share"):
        EMA(decay=1.5)


def test_weights_alone_are_refused(photos: Path, tmp_path: Path) -> None:
    alone = pl.callbacks.ModelCheckpoint(save_weights_only=True)
    run = trainer(tmp_path, EMA(), alone, enable_checkpointing=True)
    with pytest.raises(ValueError, match="save_weights_only=True"):
        run.fit(classifier(), images(photos))


def test_average_used_again_begins_anew(photos: Path, tmp_path: Path) -> None:
    average = EMA(decay=0.5)
    ends = []
    for _ in range(2):
        model = classifier(lr=0.05)
        trainer(tmp_path, average, max_epochs=2).fit(model, images(photos))
        ends.append(fingerprint(model.state_dict()))
    assert ends[0] == ends[1]
    assert ends[0] != fingerprint(classifier().state_dict())


class EveryBatch(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"{number:02}.ckpt", weights_only=False)


def test_resumed_while_gradients_accumulate(photos: Path, tmp_path: Path) -> None:
    """Running statistics go back to the last step in the model that trains, too."""

    def fit(resume: Path | None, *callbacks: pl.Callback) -> str:
        model = classifier(lr=0.05, train_bn=True)
        run = trainer(tmp_path, EMA(decay=0.5), *callbacks, max_epochs=3, accumulate_grad_batches=2)
        run.fit(model, images(photos), ckpt_path=resume, weights_only=True)
        return fingerprint(model.state_dict())

    whole = fit(None, EveryBatch(tmp_path))
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 9
    for checkpoint in checkpoints[:-1]:
        assert fit(checkpoint) == whole, checkpoint.name
