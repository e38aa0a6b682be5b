"""A fit keeps its best and its last checkpoint, and those that the user adds."""

from pathlib import Path

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tests.cli.runs import INTERRUPT, Run, fit, in_one_line, metrics
from tl_lightning.cli import main
from tl_lightning.modules import LinearProbe


def test_fit_leaves_best_and_last_checkpoint_metrics_and_configuration(trained: Run) -> None:
    assert sorted(path.name for path in (trained.folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert {"config.yaml", "metrics.csv"} <= {path.name for path in trained.folder.iterdir()}
    assert {"train_loss", "val_loss", "val_accuracy", "val_f1"} <= metrics(trained.folder)[0].keys()


def test_last_is_the_last_epoch_and_best_the_one_of_highest_f1_then_lowest_loss(trained: Run) -> None:
    last, best = (torch.load(file, weights_only=True) for file in (trained.last, trained.best))
    assert last["epoch"] == 14
    scores = [(float(row["val_f1"]), -float(row["val_loss"])) for row in metrics(trained.folder) if row["val_f1"]]
    assert len({f1 for f1, _ in scores}) < len(scores), "no two epochs have equal F1, so the loss decides nothing"
    assert best["epoch"] == scores.index(max(scores))


class AccuracyProbe(LinearProbe):
    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes)})


def test_metrics_without_f1_choose_the_best_epoch_by_the_loss(photos: Path, tmp_path: Path) -> None:
    folder = fit(photos, tmp_path, "--model=tests.cli.test_checkpoints.AccuracyProbe")
    assert "val_loss" in str(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"])


def test_checkpoints_of_the_user_are_added(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    steps += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename={step}"]
    steps += ["--data.batch_size=8", "--trainer.max_epochs=2"]
    folder = fit(photos, tmp_path, *steps)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", *(f"step={step}.ckpt" for step in range(1, 9))]
    assert str(Path("checkpoints") / "best.ckpt") in capsys.readouterr().out

    with pytest.raises(SystemExit):
        fit(photos, tmp_path, *steps, f"--trainer.callbacks+={INTERRUPT}", "--trainer.callbacks.batch=2")
    assert "step=6.ckpt" in capsys.readouterr().out, "the newest checkpoint is the one to resume from"


def test_checkpoint_of_the_user_that_monitors_a_score_replaces_the_best(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss"]
    folder = fit(photos, tmp_path, *scored, "--trainer.callbacks.filename=mine", "--test_after_fit=true")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "mine.ckpt"]
    printed = in_one_line(capsys.readouterr().out)
    assert "best val_loss" in printed
    assert printed.count("mine.ckpt") == 2, "it is both the best and the tested one"


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoint_of_the_user_has_a_name_of_its_own(name: str, photos: Path, tmp_path: Path) -> None:
    own = ["--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.filename={name}"]
    with pytest.raises(ValueError, match=f"writes {name}.ckpt, which the run writes too: give it another filename"):
        fit(photos, tmp_path, *own)
    with pytest.raises(ValueError, match="another filename"):
        fit(photos, tmp_path, *own, f"--trainer.callbacks.dirpath={tmp_path / 'version_0' / 'checkpoints'}")
    fit(photos, tmp_path, *own, f"--trainer.callbacks.dirpath={tmp_path / 'elsewhere'}")


def test_probe_that_a_run_reverts_to_is_tested_and_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model=PartialFineTuning", "--model.unfreeze_from=layer1", "--model.lr=0.05", "--model.backbone_lr=50.0"]
    schedule = ["--trainer.callbacks=StagedUnfreezing", "--trainer.callbacks.schedule={6: layer1}"]
    more = ["--trainer.max_epochs=8", "--test_after_fit=true", "--trainer.callbacks+=ProbeFallback"]
    with pytest.warns(UserWarning, match="reverted to the probe"):
        folder = fit(photos, tmp_path, *model, *schedule, *more)
    printed = in_one_line(capsys.readouterr().out)
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert printed.count("probe.ckpt") == 2, "it is both the model to use and the tested one"
    assert "best.ckpt" not in printed
    (tested,) = [row for row in metrics(folder) if row.get("test_loss")]
    probe = f"--ckpt_path={folder / 'checkpoints' / 'probe.ckpt'}"
    again = tmp_path / "again"
    main(["test", f"--data.root={photos}", "--data.num_workers=0", probe, f"--trainer.default_root_dir={again}"])
    (row,) = metrics(again / "version_0")
    assert row["test_loss"] == tested["test_loss"]
