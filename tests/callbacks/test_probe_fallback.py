from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.images import images
from tests.staged import classifier, schedulers, trainer
from tl_lightning.callbacks import EMA, ProbeFallback, StagedUnfreezing, Summary
from tl_lightning.modules import PartialFineTuning
from tl_lightning.utils.hashing import fingerprint

# A resumed run writes into the folder of the first run.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
]


SCHEDULE: dict[int, str | int] = {6: "layer1"}


def run(
    photos: Path, folder: Path, resume: Path | None = None, *callbacks: pl.Callback, **options: Any
) -> tuple[PartialFineTuning, ProbeFallback, float]:
    fallback = ProbeFallback(options.pop("monitor", "val_accuracy"))
    staged = StagedUnfreezing(options.pop("schedule", SCHEDULE), warmup_epochs=0)
    of_trainer = {"max_epochs": options.pop("max_epochs", 10), "enable_checkpointing": True} | options.pop(
        "trainer", {}
    )
    model = classifier(lr=0.05, **options)
    each = trainer(folder, staged, fallback, *callbacks, **of_trainer)
    each.fit(model, images(photos), ckpt_path=resume, weights_only=True)
    score = trainer(folder).validate(model, images(photos), verbose=False)[0]["val_accuracy"]
    return model, fallback, score


class ValidationCheckpoint(ModelCheckpoint):
    """Has a state key of its own, beside two others."""


def load_probe(folder: Path) -> PartialFineTuning:
    (path,) = folder.rglob("probe.ckpt")
    return PartialFineTuning.load_from_checkpoint(path)


def is_same(first: PartialFineTuning, second: PartialFineTuning) -> bool:
    return fingerprint(first.state_dict()) == fingerprint(second.state_dict())


def test_classifier_reverts_to_the_probe_if_fine_tuning_ends_below_it(photos: Path, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"fine-tuning ended with val_accuracy .*reverted to the probe. Use .*probe.ckpt"
    ):
        model, fallback, score = run(photos, tmp_path, backbone_lr=50.0)
    assert fallback.reverted
    assert score == pytest.approx(fallback.probe_score)
    assert is_same(load_probe(tmp_path), model)


def test_fine_tuned_weights_stay_if_they_are_as_good(photos: Path, tmp_path: Path) -> None:
    model, fallback, score = run(photos, tmp_path, backbone_lr=1e-6)
    assert not fallback.reverted
    assert fallback.probe_score is not None
    assert score >= fallback.probe_score
    assert not is_same(load_probe(tmp_path), model)


def test_run_resumed_at_any_moment_reverts_to_the_same_probe(photos: Path, tmp_path: Path) -> None:
    """Also where it was killed in the first epoch of fine-tuning, so that its checkpoint is that of the probe's end."""
    schedule: dict[int, str | int] = {2: "layer1"}
    options: dict[str, Any] = {"backbone_lr": 50.0, "max_epochs": 4, "schedule": schedule}
    keep: dict[str, Any] = {"save_top_k": -1, "dirpath": tmp_path}
    moments = [
        ModelCheckpoint(filename="epoch-{epoch}", save_on_train_epoch_end=True, **keep),
        ModelCheckpoint(filename="step-{step}", every_n_train_steps=1, **keep),
        ValidationCheckpoint(filename="validated-{epoch}", save_on_train_epoch_end=False, **keep),
    ]
    with pytest.warns(UserWarning, match="reverted to the probe"):
        model, _, _ = run(photos, tmp_path, None, *moments, **options)
    assert len(list(tmp_path.glob("validated-*.ckpt"))) == 4
    late = [p for p in sorted(tmp_path.glob("*-*.ckpt")) if torch.load(p, weights_only=True)["global_step"] > 3]
    assert len(late) > 12
    for moment in late:
        quiet = ModelCheckpoint(dirpath=tmp_path, filename="again")
        with pytest.warns(UserWarning, match="reverted to the probe"):
            again, fallback, _ = run(photos, tmp_path, moment, quiet, **options)
        assert fallback.reverted
        assert is_same(again, model), moment.name


def test_probe_is_found_only_in_the_folder_of_the_run_which_may_have_moved(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backbone_lr": 50.0, "schedule": {1: "layer1"}, "scheduler": schedulers(0)["none"]}
    last = ModelCheckpoint(tmp_path / "a", "last")
    with pytest.warns(UserWarning, match="reverted to the probe"):
        run(photos, tmp_path, None, last, max_epochs=2, **options)
    (tmp_path / "a").rename(tmp_path / "b")

    def resume(folder: str, epochs: int) -> None:
        here = ModelCheckpoint(tmp_path / folder, "last")
        run(photos, tmp_path, tmp_path / "b" / "last.ckpt", here, max_epochs=epochs, **options)

    with pytest.warns(UserWarning, match=r"reverted to the probe. Use .*/b/probe.ckpt"):
        resume("b", 3)
    with pytest.raises(FileNotFoundError, match=r"/c/probe.ckpt' does not exist: copy it there from the folder of the"):
        resume("c", 4)
    assert not (tmp_path / "c" / "probe.ckpt").exists()
    (tmp_path / "b" / "probe.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="needs the probe of the resumed run"):
        resume("b", 5)


def test_reused_callback_forgets_the_probe_of_the_run_before(photos: Path, tmp_path: Path) -> None:
    """A run that is too short to fine-tune warns."""
    fallback = ProbeFallback()
    callbacks = [StagedUnfreezing({1: "layer1"}, warmup_epochs=0), fallback]
    with pytest.warns(UserWarning, match="reverted to the probe"):
        trainer(tmp_path, *callbacks, max_epochs=3).fit(classifier(lr=0.05, backbone_lr=50.0), images(photos))
    model = classifier()
    with pytest.warns(UserWarning, match="ended before fine-tuning was validated"):
        trainer(tmp_path, *callbacks, max_epochs=1).fit(model, images(photos))
    assert not fallback.reverted
    assert is_same(model, load_probe(tmp_path))


def test_probe_has_the_averaged_weights_under_ema(photos: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="reverted to the probe"):
        model, fallback, score = run(photos, tmp_path, None, EMA(0.9), backbone_lr=50.0)
    assert score == pytest.approx(fallback.probe_score)
    assert is_same(model, load_probe(tmp_path))


def test_probe_is_the_last_validated_epoch(photos: Path, tmp_path: Path) -> None:
    of_trainer = {"check_val_every_n_epoch": 2}
    with pytest.warns(UserWarning, match="reverted to the probe"):
        _, fallback, score = run(
            photos, tmp_path, backbone_lr=50.0, schedule={5: "layer1"}, max_epochs=8, trainer=of_trainer
        )
    assert score == pytest.approx(fallback.probe_score)


def test_probe_of_another_run_is_refused(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backbone_lr": 50.0, "schedule": {1: "layer1"}, "scheduler": schedulers(0)["none"]}

    def resume(epochs: int, **more: Any) -> None:
        run(
            photos,
            tmp_path,
            tmp_path / "last.ckpt",
            ModelCheckpoint(tmp_path, "x"),
            max_epochs=epochs,
            **options,
            **more,
        )

    with pytest.warns(UserWarning, match="reverted to the probe"):
        run(photos, tmp_path, None, ModelCheckpoint(tmp_path, "last"), max_epochs=2, **options)
    probe = tmp_path / "probe.ckpt"
    content = probe.read_bytes()
    saved = torch.load(probe, weights_only=True)
    (key,) = (key for key in saved["callbacks"] if key == "ProbeFallback")
    saved["callbacks"][key]["run"] = "another"
    torch.save(saved, probe)
    for epochs in (2, 3):
        with pytest.raises(
            ValueError, match=r"needs the probe of the resumed run, but .*probe.ckpt' belongs to another run"
        ):
            resume(epochs)
    probe.write_bytes(content[:1000])
    for epochs in (2, 3):
        with pytest.raises(ValueError, match=r"probe.ckpt' cannot be read safely"):
            resume(epochs)
    probe.write_bytes(content)
    with pytest.raises(ValueError, match="compares 'val_f1', but the resumed run compared 'val_accuracy'"):
        resume(3, monitor="val_f1")


def test_fine_tuned_backbone_never_becomes_the_probe(photos: Path, tmp_path: Path) -> None:
    """A run that is resumed with a schedule that unfreezes later keeps its probe."""
    options: dict[str, Any] = {"backbone_lr": 50.0, "scheduler": schedulers(0)["none"]}
    with pytest.warns(UserWarning, match="reverted to the probe"):
        run(photos, tmp_path, None, ModelCheckpoint(tmp_path, "last"), max_epochs=2, schedule={1: "layer1"}, **options)
    before = (tmp_path / "probe.ckpt").read_bytes()
    late: dict[int, str | int] = {9: "layer1"}
    last = tmp_path / "last.ckpt"
    with pytest.warns(UserWarning, match="reverted to the probe"):
        run(photos, tmp_path, last, ModelCheckpoint(tmp_path, "x"), max_epochs=4, schedule=late, **options)
    assert (tmp_path / "probe.ckpt").read_bytes() == before


def test_summary_names_the_probe_whatever_the_order_of_callbacks(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = ModelCheckpoint(tmp_path, "best", monitor="val_f1", mode="max")
    staged = StagedUnfreezing({6: "layer1"}, warmup_epochs=0)
    each = trainer(tmp_path, Summary(), staged, ProbeFallback(), best, max_epochs=10, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="reverted to the probe"):
        each.fit(classifier(lr=0.05, backbone_lr=50.0), images(photos))
    printed = capsys.readouterr().out
    assert "probe.ckpt" in printed
    assert "best.ckpt" not in printed


def test_fast_dev_run_writes_nothing(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path, trainer={"fast_dev_run": True})
    assert not list(tmp_path.rglob("*.ckpt"))


def test_wrong_use_is_refused(photos: Path, tmp_path: Path) -> None:
    for callbacks in ([ProbeFallback()], [StagedUnfreezing({0: "layer3"}), ProbeFallback()]):
        with pytest.raises(ValueError, match="ProbeFallback needs epochs that train the head alone"):
            trainer(tmp_path, *callbacks).fit(classifier(), images(photos))
    with pytest.raises(ValueError, match=r"compares 'val_glory', which validation does not log.*val_accuracy"):
        run(photos, tmp_path, monitor="val_glory", trainer={"limit_train_batches": 0})
    with pytest.raises(ValueError, match="mode is 'Max'"):
        ProbeFallback(mode="Max")  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match="limit_val_batches is 0"):
        run(photos, tmp_path, trainer={"limit_val_batches": 0})
    with pytest.raises(ValueError, match="no validation before it"):
        run(photos, tmp_path, schedule={1: "layer1"}, trainer={"check_val_every_n_epoch": 3})
