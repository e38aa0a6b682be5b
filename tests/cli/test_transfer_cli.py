"""The command line, end to end, on small images."""

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tests.doubles import image_folder, save_image
from tl_lightning.cli import main
from tl_lightning.cli.defaults import default_precision
from tl_lightning.cli.run_folder import claim_folder, find_checkpoint, newest_checkpoint
from tl_lightning.images import read_image
from tl_lightning.modules import LinearProbe, TransferClassifier
from tl_lightning.transforms import eval_transform
from tl_lightning.utils.hashing import fingerprint

TINY = ["--backbone=tests.doubles.TinyBackbone", "--model=LinearProbe"]


def fit(root: Path, runs: Path, *more: str) -> Path:
    """Fit by the command line and return the run's folder."""
    common = ["--data=ImageFolderDataModule", "--data.num_workers=0", "--trainer.max_epochs=2", "--model.lr=0.05"]
    before = set(runs.glob("version_*"))
    main(["fit", *TINY, *common, f"--data.root={root}", f"--trainer.default_root_dir={runs}", *more])
    (new,) = set(runs.glob("version_*")) - before
    return new


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("cli") / "photos", {"ant": 12, "bee": 16, "cat": 13})
    return fit(root, root.parent / "runs", "--data.val_fraction=0.3", "--trainer.max_epochs=15")


def photos_of(run: Path) -> Path:
    return run.parent.parent / "photos"


# What a fit says and leaves behind ------------------------------------------------------------------------------------


def test_fit_leaves_best_last_metrics_and_configuration(run: Path) -> None:
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert {"config.yaml", "metrics.csv"} <= {path.name for path in run.iterdir()}
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_accuracy", "val_f1"} <= set(header)


def test_last_is_the_last_epoch_and_best_the_best(run: Path) -> None:
    last, best = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    assert last["epoch"] == 14
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    scores = [(float(row["val_f1"]), -float(row["val_loss"])) for row in rows if row["val_f1"]]
    assert len({f1 for f1, _ in scores}) < len(scores), "no two epochs are equal, so that the loss decides nothing"
    assert best["epoch"] == scores.index(max(scores))


def test_plan_and_outcome_are_printed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit(photos, tmp_path, "--test_after_fit=true")
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "LinearProbe on tiny",
        "3: ant, bee, cat",
        "33 train, 4 val, 4 test",
        "stem to layer3: 6,444",
        "parameters, in eval mode",
        "head: 75 parameters",
        "AdamW: head 0.05 ",
        "warm-up, then a cosine to 0 over 2 steps",
        "2 epochs, counted from 0, 2 steps",
        "best val_f1",
        "test accuracy",
        "test macro F1",
        str(folder),
    ):
        assert part in printed.replace(" /", "/").replace("/ ", "/"), part


def test_plan_of_a_staged_run_shows_each_stage(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "backbone": {"class_path": "tests.doubles.TinyBackbone"},
        "data": {"class_path": "ImageFolderDataModule", "init_args": {"root": str(photos), "num_workers": 0}},
        "model": {"class_path": "PartialFineTuning", "init_args": {"unfreeze_from": "layer2", "lr": 0.01}},
        "trainer": {
            "max_epochs": 2,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "StagedUnfreezing", "init_args": {"schedule": {1: "layer3", 5: "layer2"}}}],
        },
    }
    (tmp_path / "staged.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={tmp_path / 'staged.yaml'}"])
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "frozen stem to layer2: 2,916 parameters, in eval mode; layer2 may train, but never does in this run",
        "from epoch 0 head: 75 parameters",
        "from epoch 1 head: 75 parameters; layer3: 3,528",
        "from epoch 5 head: 75 parameters; layer2 to layer3: 5,304 (never: the run is shorter)",
        "AdamW: head 0.01, layer3 0.001 ",
    ):
        assert part in printed, part

    callbacks = config["trainer"]["callbacks"]  # type: ignore[index]  # of the dict above
    callbacks[0]["init_args"]["schedule"] = {1: "layer3"}
    config["trainer"]["max_epochs"] = 1  # type: ignore[index]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={tmp_path / 'short.yaml'}"])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "frozen stem to layer3: 6,444 parameters, in eval mode; layer2 to layer3 may train, but never do in this run"
        in printed
    )


class Interrupt(pl.Callback):
    def __init__(self, epoch: int = 1, batch: int = 0) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if (trainer.current_epoch, args[1]) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("epoch", "advice"), [(0, "nothing yet"), (1, "the same command and --ckpt_path")])
def test_interrupted_run_says_how_it_goes_on(
    epoch: int, advice: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = ["--trainer.callbacks=tests.cli.test_transfer_cli.Interrupt", f"--trainer.callbacks.epoch={epoch}"]
    with pytest.raises(SystemExit):
        fit(photos, tmp_path, *interrupt)
    assert advice in " ".join(capsys.readouterr().out.split())


def test_checkpoints_of_ones_own_come_on_top(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    steps += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename={step}", "--data.batch_size=8"]
    folder = fit(photos, tmp_path, *steps)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", *(f"step={step}.ckpt" for step in range(1, 9))]
    assert str(Path("checkpoints") / "best.ckpt") in capsys.readouterr().out

    scored = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss"]
    scored += ["--trainer.callbacks.filename=mine", "--test_after_fit=true"]
    folder = fit(photos, tmp_path, *scored)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "mine.ckpt"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "best val_loss" in printed
    assert printed.count("mine.ckpt") == 2, "it is both the best and the tested one"

    interrupt = ["--trainer.callbacks+=tests.cli.test_transfer_cli.Interrupt", "--trainer.callbacks.batch=2"]
    with pytest.raises(SystemExit):
        fit(photos, tmp_path, *steps, *interrupt)
    assert "step=6.ckpt" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_do_not_share_a_name(name: str, photos: Path, tmp_path: Path) -> None:
    own = ["--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.filename={name}"]
    with pytest.raises(
        ValueError, match=f"writes {name}.ckpt, which the run writes too: give it another filename"
    ):
        fit(photos, tmp_path, *own)
    with pytest.raises(ValueError, match="another filename"):
        fit(photos, tmp_path, *own, f"--trainer.callbacks.dirpath={tmp_path / 'version_0' / 'checkpoints'}")
    fit(photos, tmp_path, *own, f"--trainer.callbacks.dirpath={tmp_path / 'elsewhere'}")


def test_last_is_what_was_written_last(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1", "--data.batch_size=8"]
    steps += ["--trainer.callbacks.filename={step}"]
    weights = [*steps, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    weights += ["--trainer.callbacks.every_n_train_steps=3", "--trainer.callbacks.filename=weights"]
    interrupt = ["--trainer.callbacks+=tests.cli.test_transfer_cli.Interrupt", "--trainer.callbacks.batch=2"]
    whole = fit(photos, tmp_path / "whole", *weights)
    with pytest.raises(SystemExit):
        fit(photos, tmp_path / "runs", *weights, *interrupt)
    assert "step=6.ckpt" in capsys.readouterr().out
    resumed = [f"--data.root={photos}", "--data.num_workers=0", "--trainer.max_epochs=2", "--model.lr=0.05"]
    main(["fit", *TINY, *resumed, f"--trainer.default_root_dir={tmp_path / 'runs'}", *weights, "--ckpt_path=last"])
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for folder in (whole, tmp_path / "runs" / "version_0")]  # fmt: skip
    assert fingerprint(ends[0]) == fingerprint(ends[1])


class InterruptValidation(pl.Callback):
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_last_is_what_was_written_last_and_whole(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=4", "--data.batch_size=8"]
    whole = fit(photos, tmp_path / "whole", *steps)
    with pytest.raises(SystemExit):  # after an epoch's last batch, at which a checkpoint is written
        fit(photos, tmp_path, *steps, "--trainer.callbacks+=tests.cli.test_transfer_cli.InterruptValidation")
    place = tmp_path / "version_0" / "checkpoints"
    (step,) = set(place.glob("epoch=*.ckpt"))
    assert str(step) in capsys.readouterr().out
    assert newest_checkpoint(tmp_path) == step
    shutil.copytree(tmp_path / "version_0", tmp_path / "version_1")
    newer = tmp_path / "version_1" / "checkpoints"
    (newer / step.name).write_bytes(step.read_bytes()[:999])  # killed while it was written
    assert newest_checkpoint(tmp_path) == newer / "last.ckpt"
    (newer / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"the newest run has nothing to go on from, since .*cannot be read"):
        newest_checkpoint(tmp_path)  # rather than go on with another run
    shutil.rmtree(tmp_path / "version_1")

    same = [f"--data.root={photos}", "--data.num_workers=0", "--trainer.max_epochs=2", "--model.lr=0.05"]
    main(["fit", *TINY, *same, f"--trainer.default_root_dir={tmp_path}", *steps, "--ckpt_path=last"])
    tables = [(folder / "metrics.csv").read_text() for folder in (whole, tmp_path / "version_0")]
    assert tables[0] == tables[1]
    for name in ("best", "last"):
        places = (whole / "checkpoints", place)
        ends = [torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"] for folder in places]
        assert fingerprint(ends[0]) == fingerprint(ends[1])


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule of 3 steps before:UserWarning")
def test_run_resumed_in_another_folder_chooses_its_best_epoch_anew(photos: Path, tmp_path: Path) -> None:
    folder = fit(photos, tmp_path / "runs", "--trainer.max_epochs=3")
    copied = tmp_path / "other" / "last.ckpt"
    copied.parent.mkdir()
    shutil.copyfile(folder / "checkpoints" / "last.ckpt", copied)
    more = ["--trainer.max_epochs=4", "--test_after_fit=true", f"--ckpt_path={copied}"]
    with pytest.warns(UserWarning, match=f"resumed run, '{folder}/checkpoints/best.ckpt', is not in the folder of this"):
        again = fit(photos, tmp_path / "again", *more)
    assert torch.load(again / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 3


def test_fewer_epochs_than_are_done_are_refused(photos: Path, tmp_path: Path) -> None:
    folder = fit(photos, tmp_path, "--trainer.max_epochs=3")
    with pytest.raises(ValueError, match=r"has 3 epochs behind it, and trainer.max_epochs is 1: give at least 3"):
        fit(photos, tmp_path, "--trainer.max_epochs=1", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")


@pytest.mark.parametrize("who", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_score_that_does_not_exist_is_named_before_training(who: str, photos: Path, tmp_path: Path) -> None:
    option, path = "--trainer.callbacks", who
    if who == "ReduceLROnPlateau":
        option, path = "--model.scheduler", f"lightning.pytorch.cli.{who}"
    for wrong in ("val_acc", "accuracy"):
        with pytest.raises(ValueError, match=f"{who} monitors an unknown score '{wrong}'; did you mean 'val_accuracy'"):
            fit(photos, tmp_path, f"{option}={path}", f"{option}.monitor={wrong}")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_checkpoint_that_is_none_is_named(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    for number, content in enumerate((b"", whole[:5000], whole[:-500], b"\x89PNG\r\n\x1a\n" + bytes(99))):
        file = tmp_path / f"{number}.ckpt"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{number}.ckpt' cannot be read safely"):
            main([command, *TINY[: 2 * (command == "fit")], f"--data.root={photos_of(run)}", f"--ckpt_path={file}"])


def test_probe_that_is_handed_back_is_what_counts(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model=PartialFineTuning", "--model.unfreeze_from=layer1", "--model.backbone_lr=50.0"]
    schedule = ["--trainer.callbacks=StagedUnfreezing", "--trainer.callbacks.schedule={6: layer1}"]
    more = ["--trainer.max_epochs=8", "--test_after_fit=true", "--trainer.callbacks+=ProbeFallback"]
    with pytest.warns(UserWarning, match="reverted to the probe"):
        folder = fit(photos, tmp_path, *model, *schedule, *more)
    printed = " ".join(capsys.readouterr().out.split())
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert printed.count("probe.ckpt") == 2, "it is both the model to use and the tested one"
    assert "best.ckpt" not in printed
    (tested,) = [
        row for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row.get("test_loss")
    ]
    main(["test", f"--data.root={photos}", "--data.num_workers=0", f"--trainer.default_root_dir={tmp_path / 'again'}",
          f"--ckpt_path={folder / 'checkpoints' / 'probe.ckpt'}"])  # fmt: skip
    (again,) = csv.DictReader((tmp_path / "again" / "version_0" / "metrics.csv").read_text().splitlines())
    assert again["test_loss"] == tested["test_loss"]


def test_test_after_fit_takes_the_best_checkpoint(photos: Path, tmp_path: Path) -> None:
    folder = fit(photos, tmp_path, "--test_after_fit=true", "--data.test_fraction=0.3", "--trainer.max_epochs=4")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    (tested,) = [float(row["test_loss"]) for row in rows if row.get("test_loss")]
    (again,) = _tested(photos, folder, tmp_path / "again", "--data.test_fraction=0.3")
    assert again == pytest.approx(tested, rel=1e-5)


def _tested(photos: Path, folder: Path, runs: Path, *more: str) -> list[float]:
    checkpoint = f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    data = ["--data=ImageFolderDataModule", f"--data.root={photos}", "--data.num_workers=0"]
    main(["test", *data, checkpoint, f"--trainer.default_root_dir={runs}", *more])
    rows = list(csv.DictReader((runs / "version_0" / "metrics.csv").read_text().splitlines()))
    return [float(row["test_loss"]) for row in rows]


def test_test_needs_neither_model_nor_backbone_even_if_the_configuration_has_them(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.05
    config["backbone"]["init_args"]["weights"] = "no/such/file.pth"
    config["trainer"]["default_root_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])
    main(["validate", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])


def test_scores_of_other_images_are_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of images that nothing was trained on: some classes, no splits, all of it tested."""
    image_folder(tmp_path / "held out", {"bee": 5, "cat": 4})
    common = [f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    main(["test", *common, f"--data.root={tmp_path / 'held out'}", "--data.test_fraction=1"])
    printed = capsys.readouterr().out
    assert re.search(r"images +9\n", re.sub(r" +\n", "\n", printed))
    for part in ("tested", "test accuracy", "test macro F1", "outputs"):
        assert part in printed
    main(["validate", *common, f"--data.root={photos_of(run)}", "--data.val_fraction=0.3"])
    printed = capsys.readouterr().out
    for part in ("validated", "validation accuracy", "validation macro F1"):
        assert part in printed


def test_precision_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, native, expected in (
        (False, False, "32-true"),
        (True, False, "16-mixed"),
        (True, True, "bf16-mixed"),
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=available: found)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, found=native: found)
        assert default_precision("auto") == expected
        assert default_precision("cpu") == "32-true"


def test_optimizer_and_scheduler_by_class_path(photos: Path, tmp_path: Path) -> None:
    config = {
        "model": {
            "class_path": "LinearProbe",
            "init_args": {
                "lr": 0.3,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
                "scheduler": {
                    "class_path": "torch.optim.lr_scheduler.StepLR",
                    "init_args": {"step_size": 1, "gamma": 0.5},
                },
            },
        },
        "data": {"class_path": "ImageFolderDataModule", "init_args": {"root": str(photos), "num_workers": 0}},
        "backbone": {"class_path": "tests.doubles.TinyBackbone"},
        "trainer": {"max_epochs": 2, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "sgd.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={tmp_path / 'sgd.yaml'}"])
    last = torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    groups = last["optimizer_states"][0]["param_groups"]
    assert [(g["momentum"], g["weight_decay"], g["initial_lr"], g["lr"]) for g in groups] == [(0.9, 0, 0.3, 0.075)] * 2
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.1  # type: ignore[index]  # a tree of dicts
    (tmp_path / "sgd.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"SGD was given lr=0\.1, which would be ignored"):
        main(["fit", f"--config={tmp_path / 'sgd.yaml'}"])


def callbacks_of(folder: Path) -> list[str]:
    found = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    return [one["class_path"].rpartition(".")[2] for one in (found if isinstance(found, list) else [found])]


def test_callback_without_options_may_stand_alone(photos: Path, tmp_path: Path) -> None:
    folder = fit(photos, tmp_path, "--trainer.max_epochs=1", "--trainer.callbacks", "EMA")
    assert callbacks_of(folder) == ["EMA"]
    assert (folder / "checkpoints" / "best.ckpt").is_file()


def test_run_that_stopped_early_says_so(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stops = ["EarlyStopping", "--trainer.callbacks.monitor=val_loss", "--trainer.callbacks.stopping_threshold=100"]
    fit(photos, tmp_path, "--trainer.max_epochs=3", "--trainer.callbacks", *stops)
    assert "stopped early  in epoch 0, counted from 0, by early stopping on val_loss" in capsys.readouterr().out


def test_second_callback_joins_the_first(photos: Path, tmp_path: Path) -> None:
    staged = ["--model=PartialFineTuning", "--model.unfreeze_from=layer3", "--trainer.callbacks", "StagedUnfreezing"]
    staged += [
        "--trainer.callbacks.schedule",
        "{1: layer3}",
        "--trainer.callbacks=EMA",
        "--trainer.callbacks.decay=0.9",
    ]
    folder = fit(photos, tmp_path, *staged)
    assert callbacks_of(folder) == ["StagedUnfreezing", "EMA"]


# Prediction -----------------------------------------------------------------------------------------------------------


def predict(run: Path, root: Path, runs: Path, *more: str) -> list[dict[str, str]]:
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    main(["predict", f"--data.root={root}", checkpoint, f"--trainer.default_root_dir={runs}", *more])
    (table,) = runs.rglob("predictions.csv")
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


def test_flat_folder_predicts_the_right_classes(run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee", "cat") * 8):
        save_image(tmp_path / "flat" / f"{number:02d} {name}, new.png", seed=9000 + number, colour=number % 3)
    rows = predict(run, tmp_path / "flat", tmp_path / "runs", "--data.batch_size=5", "--data.num_workers=0")
    assert list(rows[0]) == ["path", "class_name", "probability", "ant", "bee", "cat"]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert len(rows) == 24
    right = sum(row["class_name"] in row["path"] for row in rows)
    assert right >= 20, f"{right} of 24"
    model = TransferClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    transform = eval_transform(model.backbone.preprocessing)
    for row in rows[:7]:
        with torch.no_grad():
            expected = model(transform(read_image(tmp_path / "flat" / row["path"]))[None]).softmax(1)[0].tolist()
        given = [float(row[name]) for name in ("ant", "bee", "cat")]
        assert given == pytest.approx(expected, abs=1e-5)
        assert float(row["probability"]) == max(given)


def test_nested_folder_keeps_its_paths(run: Path, tmp_path: Path) -> None:
    rows = predict(run, photos_of(run), tmp_path, "--data.num_workers=0")
    assert len(rows) == 41
    assert rows[0]["path"] == "ant/000.png"
    assert sum(row["path"].startswith(row["class_name"]) for row in rows) > 30


def test_default_data_module_takes_a_folder(run: Path, tmp_path: Path) -> None:
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    main(["predict", f"--data.root={photos_of(run)}", checkpoint, f"--trainer.default_root_dir={tmp_path}"])
    assert list(tmp_path.rglob("predictions.csv"))


# Wrong input ----------------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as caught:
        main(list(args))
    return f"{caught.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("subcommand", ["test", "validate", "predict"])
def test_missing_checkpoint(subcommand: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, subcommand, f"--data.root={photos}")
    assert "a trained model is needed: add --ckpt_path FILE" in message
    message = fails(capsys, subcommand, f"--data.root={photos}", "--ckpt_path=none.ckpt")
    assert "the checkpoint 'none.ckpt' does not exist" in message


def test_fit_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "fit")
    assert "ImageFolderDataModule needs 'root': add --data.root FOLDER" in message
    assert len(message.splitlines()) < 12, "the mistake drowns in usage"


def test_number_of_classes_typed_by_hand(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(
        capsys, "fit", *TINY, f"--data.root={photos}", "--model.num_classes=7", f"--trainer.default_root_dir={tmp_path}"
    )
    assert "model.num_classes is 7, and the data have 3 classes (ant, bee, cat); leave it out" in message
    assert not list(tmp_path.iterdir()), "something was written before the mistake was found"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--backbone=TorchvisionBackbone", "--backbone.name=resnet19"], "did you mean 'resnet1"),
        (["--backbone=TorchvisionBackbone", "--backbone.name=resnet18", "--backbone.weights=x.pth"], "does not exist"),
        (["--backbone=tests.doubles.TinyBackbone", "--data.root=nowhere"], "the data folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    args: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["fit", "--model=LinearProbe", f"--data.root={photos}", f"--trainer.default_root_dir={tmp_path}"]
    assert message in fails(capsys, *common, *args)
    assert not list(tmp_path.iterdir())


OWN_MODULE = """
from torch import nn
from tl_lightning.modules import LinearProbe

class SmoothedProbe(LinearProbe):
    def compute_loss(self, logits, target):
        return nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
"""


def test_class_of_ones_own_trains_and_predicts(photos: Path, tmp_path: Path) -> None:
    """From the folder at hand, by the console script; naming the class is what trusts it."""
    (tmp_path / "my_probes.py").write_text(OWN_MODULE)
    script = Path(sys.executable).with_name("tl-lightning")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - our own script
            [script, *args], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    fitted = run(*("fit", "--backbone=tests.doubles.TinyBackbone", "--model=my_probes.SmoothedProbe"), *_short(photos))
    assert fitted.returncode == 0, fitted.stderr
    refused = run("predict", f"--data.root={photos}", "--ckpt_path=best")
    assert refused.returncode == 1
    assert "names the class 'my_probes.SmoothedProbe'" in refused.stderr
    assert (
        "add --model my_probes.SmoothedProbe --backbone tests.doubles.TinyBackbone or --config runs/version_0/config.yaml"
        in refused.stderr
    )
    absent = run("predict", f"--data.root={photos}", "--ckpt_path=best", "--model=my_absent_module.Probe")
    assert "there is no module 'my_absent_module'" in absent.stderr
    assert "Traceback" not in absent.stderr
    assert "Traceback" not in refused.stderr, "a mistake of the user's is one message"
    trust = ["--backbone=tests.doubles.TinyBackbone", "--model=my_probes.SmoothedProbe"]
    for more in (trust, ["--config=runs/version_0/config.yaml"]):
        predicted = run("predict", f"--data.root={photos}", "--data.num_workers=0", "--ckpt_path=best", *more)
        assert predicted.returncode == 0, predicted.stderr
        assert "predictions.csv" in predicted.stdout


def _short(photos: Path) -> list[str]:
    return [f"--data.root={photos}", "--data.num_workers=0", "--trainer.max_epochs=1"]


def test_configuration_without_classes_leaves_the_defaults(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(
        "trainer: {max_epochs: 1}\nmodel: {class_path: LinearProbe, init_args: {lr: 0.1}}\n"
    )
    backbone = "--backbone=tests.doubles.TinyBackbone"
    main(
        [
            "fit",
            f"--config={tmp_path / 'short.yaml'}",
            backbone,
            f"--data.root={photos}",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert (tmp_path / "version_0" / "checkpoints" / "best.ckpt").is_file()


def test_run_that_could_not_be_tested_is_found_before_training(photos: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"--data.root={photos}", f"--trainer.default_root_dir={tmp_path}", "--test_after_fit=true"]
    with pytest.raises(ValueError, match="none for 'test'"):
        main(["fit", *arguments, "--data.test_fraction=0"])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_metrics_without_f1_choose_by_the_loss(photos: Path, tmp_path: Path) -> None:
    folder = fit(photos, tmp_path, "--model=tests.cli.test_transfer_cli.AccuracyProbe", "--model.lr=0.05")
    assert "val_loss" in str(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"])


class AccuracyProbe(LinearProbe):
    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes)})


def test_names_are_printed_to_the_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder(tmp_path / "photos", {"[red]": 6, "[bold]": 6})
    fit(photos, tmp_path / "runs[v2]")
    printed = capsys.readouterr().out
    assert "2: [bold], [red]" in printed
    assert "runs[v2]" in printed.replace("\n", "").replace(" ", "")


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_resumed_run_keeps_its_best_score_its_metrics_and_its_configuration(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a relative folder, as by default, and a learning rate that only gets worse."""
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", *TINY, f"--data.root={photos}", "--data.num_workers=0", "--data.val_fraction=0.3"]
    main([*arguments, "--model.lr=0.05", "--trainer.max_epochs=6"])
    run = tmp_path / "runs" / "version_0"
    before = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    rows = (run / "metrics.csv").read_text().splitlines()
    config = (run / "config.yaml").read_text()
    best = {"best.ckpt": (run / "checkpoints" / "best.ckpt").read_bytes()}

    with pytest.raises(ValueError, match="drawn from seed 42 then and from seed 7 now"):
        main([*arguments, "--model.lr=0.5", "--seed_everything=7", "--trainer.max_epochs=9", "--ckpt_path=last"])
    assert (run / "config.yaml").read_text() == config, "a run that was refused has changed the configuration"
    assert (run / "metrics.csv").read_text().splitlines() == rows
    with (run / "metrics.csv").open("a") as file:
        file.write(rows[-1][:7])  # of a run that was killed while it wrote

    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (name,) = [key for key in state["callbacks"] if key.startswith("BestCheckpoint")]
    state["callbacks"][name]["best_model_score"] = torch.tensor(2.0)  # nothing that comes is as good
    (path,) = state["callbacks"][name]["best_k_models"]
    state["callbacks"][name]["best_k_models"] = {path: torch.tensor(2.0)}
    torch.save(state, run / "checkpoints" / "last.ckpt")
    run.rename(tmp_path / "runs" / "version_3")
    run = tmp_path / "runs" / "version_3"
    main([*arguments, "--model.lr=0.05", "--trainer.max_epochs=9", "--ckpt_path=last"])
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == before
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == best["best.ckpt"]
    after = (run / "metrics.csv").read_text().splitlines()
    assert after[: len(rows)] == rows
    assert [line.partition(",")[0] for line in after[len(rows) :]] == ["6", "6", "7", "7", "8", "8"]
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    assert sorted(path.name for path in tmp_path.joinpath("runs").iterdir()) == ["version_3"]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(claim_folder, [tmp_path / "runs"] * 40))
    assert len(set(folders)) == 40
    assert sorted(int(folder.name[8:]) for folder in folders) == list(range(40))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file', a file; give a folder"):
        claim_folder(tmp_path / "file")
    with pytest.raises(OSError, match=r"file/runs', where no folder can be made \(Not a directory\); give another"):
        claim_folder(tmp_path / "file" / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "not mounted" / "runs")
    with pytest.raises(OSError, match=r"default_root_dir is .*link.*, where no folder can be made \(File exists\)"):
        claim_folder(tmp_path / "link")


def test_newest_run_with_a_checkpoint_is_found(tmp_path: Path) -> None:
    for number in (2, 10, 11):
        (tmp_path / f"version_{number}" / "checkpoints").mkdir(parents=True)
        if number < 11:
            (tmp_path / f"version_{number}" / "checkpoints" / "last.ckpt").touch()
    assert find_checkpoint(tmp_path, "last").parts[-3] == "version_10"
    with pytest.raises(FileNotFoundError, match=r"has a best\.ckpt; give the path"):
        find_checkpoint(tmp_path, "best")


# Help -----------------------------------------------------------------------------------------------------------------


def _seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)  # noqa: S603 - our own interpreter
    return time.perf_counter() - start


@pytest.mark.slow
def test_help_costs_little_more_than_importing_lightning() -> None:
    commands = {
        "lightning": ["-c", "import lightning.pytorch"],
        "help": ["-m", "tl_lightning", "--help"],
        "fit": ["-m", "tl_lightning", "fit", "--help"],
    }
    rounds = [{name: _seconds(*command) for name, command in commands.items()} for _ in range(5)]
    seconds = {name: min(one[name] for one in rounds) for name in commands}  # side by side, the least disturbed of each
    assert seconds["help"] < 1.2 * seconds["lightning"], seconds
    assert seconds["fit"] < 1.2 * seconds["lightning"], seconds


@pytest.mark.parametrize("words", [["sweep", "--help"], ["fit", "--model.help", "CustomHeadClassifier"]])
def test_help_lists_heads_and_not_all_modules(words: list[str]) -> None:
    text = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-m", "tl_lightning", *words], check=True, capture_output=True, text=True
    ).stdout
    for head in ("LinearHead", "MLPHead", "CosineHead", "ConvHead"):
        assert f".{head}" in text
    assert "torchvision.models" not in text
    assert len(text.splitlines()) < 600


def test_help_reads_well() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "tl_lightning", "fit", "--help"], check=True, capture_output=True, text=True
    ).stdout
    lines = help_text.splitlines()
    assert lines[0] == "usage: tl-lightning fit [--config FILE] [--data.root FOLDER] [options]"
    assert lines[2] == "Train a classifier on a folder of images."
    titles = ["The network:", "The images:", "The strategy:", "The trainer, which is Lightning's:", "The run:"]
    assert [line for line in lines if line in titles] == titles, "the user's own choices come first"
    text = " ".join(help_text.split())
    for part in ("resnet50 where none is named", "ImageFolderDataModule where none is named", "LinearProbe where none"):
        assert part in text
    assert "_preprocessing_of" not in text
