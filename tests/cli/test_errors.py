"""What the command line says when something is wrong or ends early: what was given, what is allowed, what to do next."""

import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tests.doubles import image_folder
from tl_lightning.cli import main
from tl_lightning.cli.run_folder import give_back_folder
from tl_lightning.data.image_loader import ImageDataset, ImageLoader
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.utils.console import print_table

ROOT = Path(__file__).parents[2]
BACKBONE = "--backbone=tests.doubles.TinyBackbone"


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-m", "tl_lightning", *args],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fit(photos: Path, runs: Path, *more: str) -> None:
    """Fit by the command line, in this process."""
    common = [f"--data.root={photos}", "--data.num_workers=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    backbone = [] if any(option.startswith("--backbone") for option in more) else [BACKBONE]
    main(["fit", *backbone, *common, f"--trainer.default_root_dir={runs}", *more])


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    runs = tmp_path_factory.mktemp("messages") / "runs"
    fit(photos, runs, *PARTIAL)
    return runs / "version_0"


# Mistakes of the command line and of configurations --------------------------------------------------------------------

PARTIAL = ["--model=PartialFineTuning", "--model.unfreeze_from=layer2"]
STAGED = ["--trainer.callbacks=StagedUnfreezing"]
SCHEDULE = "it is {epoch: stage}, as {3: layer4}"


def _refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    message = capsys.readouterr().err.removeprefix("Seed set to 42\n")
    assert caught.value.code == 2
    assert message.startswith("tl-lightning: error: ")
    assert len(message.splitlines()) < 6, message
    return message


@pytest.mark.parametrize(
    ("options", "said", "listed"),
    [
        (
            ["--model=PartialFineTuning", "--model.unfreez_from=layer4"],
            "PartialFineTuning has no option 'unfreez_from'; did you mean 'unfreeze_from'?",
            "fit --model.help PartialFineTuning",
        ),
        (
            ["--model.unfreez_from=layer4"],
            "LinearProbe has no option 'unfreez_from'\nPartialFineTuning has 'unfreeze_from': name the class with --model",
            "fit --model.help LinearProbe",
        ),
        (["--data.rot=x"], "ImageFolderDataModule has no option 'rot'; did you mean 'root'?", "fit --data.help Image"),
        (
            ["--backbone.nam=x"],
            "TorchvisionBackbone has no option 'nam'; did you mean 'name'?",
            "fit --backbone.help T",
        ),
        (["--maxepochs=x"], "has no option 'maxepochs'; did you mean 'trainer.max_epochs'?", "fit --help"),
        (
            ["--trainer.callbacks=EMA", "--trainer.callbacks.deca=0.9"],
            "EMA has no option 'deca'; did you mean 'decay'?",
            "fit --trainer.callbacks.help EMA",
        ),
        (
            ["--model.optimizer=SGD", "--model.optimizer.momentu=0.9"],
            "SGD has no option 'momentu'; did you mean 'momentum'?",
            "fit --model.optimizer.help SGD",
        ),
        (
            ["--model.optimizer.lr=0.1"],
            "has no class to go to: name the class before it, as in --model.optimizer CLASS --model.optimizer.lr ...\nThe learning rate is --model.lr",
            "fit --help",
        ),
    ],
)
def test_misspelt_option(options: list[str], said: str, listed: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, "fit", "--data.root=x", *options)
    assert said in message
    assert f"All options: tl-lightning {listed}" in message


@pytest.mark.parametrize(
    ("options", "said", "listed"),
    [
        ([], "ImageFolderDataModule needs 'root': add --data.root FOLDER", "--data.help ImageFolderDataModule"),
        (
            ["--data.root=x", "--model=PartialFineTuning"],
            "PartialFineTuning needs 'unfreeze_from': add --model.unfreeze_from STAGE",
            "--model.help PartialFineTuning",
        ),
        (
            ["--data.root=x", *STAGED],
            "StagedUnfreezing needs 'schedule': add --trainer.callbacks.schedule '{3: layer4}'",
            "--trainer.callbacks.help StagedUnfreezing",
        ),
    ],
)
def test_forgotten_option(options: list[str], said: str, listed: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, "fit", *options)
    assert said in message
    assert f"All options: tl-lightning fit {listed}" in message


class UntypedHead(nn.Module):
    def __init__(self, in_features, num_classes, width=8) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - that is what is tested
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.Linear(width, num_classes))


def test_class_without_types(capsys: pytest.CaptureFixture[str]) -> None:
    head = ["--model=CustomHeadClassifier", "--model.head=tests.cli.test_errors.UntypedHead"]
    message = _refused(capsys, "fit", "--data.root=x", *head)
    assert "UntypedHead says no type of its argument 'in_features'" in message
    assert "annotate its arguments" in message


def test_unknown_class(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {class_path: PartialFinetuning, init_args: {unfreeze_from: layer4}}")
    for options in (["--model=PartialFinetuning"], [f"--config={tmp_path / 'wrong.yaml'}"]):
        message = _refused(capsys, "fit", "--data.root=x", *options)
        assert "unknown class 'PartialFinetuning'; did you mean 'PartialFineTuning'? --model has Custom" in message
        assert "by its dotted path, as --model my_module.MyClass" in message
    message = _refused(capsys, "fit", "--data.root=x", "--model=my_absent_module.Smoothed")
    assert "--model my_absent_module.Smoothed cannot be found: No module named 'my_absent_module'" in message
    assert str(Path.cwd()) in message


@pytest.mark.parametrize("given", ["{conv_head: 0}", "['conv_head']"])
def test_schedule_of_another_form(given: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    callback = f"{{class_path: StagedUnfreezing, init_args: {{schedule: {given}}}}}"
    (tmp_path / "wrong.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}")
    for options in ([*STAGED, f"--trainer.callbacks.schedule={given}"], [f"--config={tmp_path / 'wrong.yaml'}"]):
        message = _refused(capsys, "fit", "--data.root=x", *options)
        assert SCHEDULE in message
        assert "conv_head" in message


def test_option_of_a_callback_that_is_not_the_last(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    staged = "{class_path: StagedUnfreezing, init_args: {schedule: {5: stem}}}"
    config.write_text(f"trainer: {{callbacks: [{staged}, {{class_path: ProbeFallback}}]}}")
    message = _refused(capsys, "fit", "--data.root=x", f"--config={config}", "--trainer.callbacks.schedule={1: stem}")
    assert "ProbeFallback has no option 'schedule'\nStagedUnfreezing has 'schedule'\n" in message
    assert "go to the last callback of the list" in message


def test_wrong_places_and_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {class_path: LinearProbe, lr: 0.1}")
    message = _refused(capsys, "fit", "--data.root=x", f"--config={tmp_path / 'wrong.yaml'}")
    assert "'lr' stands beside class_path in the configuration: put it under init_args" in message
    assert "--model.lr is abc; it takes float" in _refused(capsys, "fit", "--data.root=x", "--model.lr=abc")
    assert "--trainer.max_epochs is many; it takes int or null" in _refused(capsys, "fit", "--trainer.max_epochs=many")
    assert "unknown command 'fitt'; did you mean 'fit'" in _refused(capsys, "fitt")


def test_another_backbone_takes_no_argument_of_that_in_the_configuration(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "resnet.yaml"
    arguments = "{name: resnet50, weights: x.pth, image_size: 64}"
    config.write_text(f"backbone: {{class_path: TorchvisionBackbone, init_args: {arguments}}}")
    for number, named in enumerate((["--backbone", "EfficientNetLite"], ["--backbone=EfficientNetLite"])):
        fit(photos, tmp_path / "runs", f"--config={config}", *named)
        saved = yaml.safe_load((tmp_path / "runs" / f"version_{number}" / "config.yaml").read_text())
        expected = {"name": "efficientnet_lite0", "weights": "DEFAULT", "image_size": None}
        assert saved["backbone"]["init_args"] == expected
    with pytest.raises(ValueError, match=r"x\.pth' does not exist"):  # of the same class, they stay
        fit(photos, tmp_path / "runs", f"--config={config}", "--backbone=tl_lightning.backbones.TorchvisionBackbone")


def test_refused_run_leaves_no_folder(photos: Path, run: Path, tmp_path: Path) -> None:
    for message, options in (
        ("ProbeFallback needs epochs", ["--trainer.callbacks=ProbeFallback"]),
        ("none for 'test'", ["--data.test_fraction=0", "--test_after_fit=true"]),
    ):
        with pytest.raises(ValueError, match=message):
            fit(photos, tmp_path / "runs", *options)
        assert not list((tmp_path / "runs").iterdir())
    other = image_folder(tmp_path / "other", {"dog": 3, "eel": 3})
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(ValueError, match="unknown class"):
        main(["test", f"--data.root={other}", checkpoint, f"--trainer.default_root_dir={tmp_path / 'runs'}"])
    assert not list((tmp_path / "runs").iterdir())
    with pytest.raises(RuntimeError, match="no_such_score"):
        fit(photos, tmp_path, "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=no_such_score")
    assert (tmp_path / "version_0" / "config.yaml").is_file(), "this one has trained"
    kept = tmp_path / "version_1"
    kept.mkdir()
    (kept / "notes.txt").touch()
    give_back_folder(kept)
    assert kept.is_dir(), "of somebody else"


@pytest.mark.parametrize(
    "arguments", [[], ["fit", "--maxepochs=3"], ["test", "--data.root=x", "--ckpt_path=none.ckpt"]]
)
def test_program_has_one_name(arguments: list[str], tmp_path: Path) -> None:
    with start(*arguments, cwd=tmp_path) as process:
        _, err = process.communicate()
    assert process.returncode in (1, 2)
    (said, *rest) = err.removeprefix("Seed set to 42\n").splitlines()
    assert said.startswith("tl-lightning: error: ")
    assert len(rest) < 2
    assert "__main__" not in err


# Runs that end early --------------------------------------------------------------------------------------------------


def running(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, of, *_ = stat.read_text().rpartition(") ")[2].split()
            found += [stat.parent.name] * (int(of) == group and state != "Z")
    return found


@pytest.mark.parametrize(("devices", "told"), [(1, "group"), (2, "first"), (2, "all"), (2, "group")])
def test_terminated_run_says_how_it_goes_on(devices: int, told: str, photos: Path, tmp_path: Path) -> None:
    """A cluster tells the first process, or each rank's, or every process, those that load images among them."""
    arguments = [BACKBONE, f"--data.root={photos}", "--trainer.enable_progress_bar=false"]
    arguments += [f"--data.num_workers={2 if told == 'group' else 0}"]
    arguments += ["--trainer.max_epochs=5000", "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    with start("fit", *arguments, cwd=tmp_path) as process:
        while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children if told == "all" else ():
            if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes():
                os.kill(int(child), signal.SIGTERM)
        if told == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert out.count("interrupted") == 1
    assert "the same command and --ckpt_path" in out
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(process.pid), "processes were left behind"


@pytest.mark.parametrize("inside", [False, True])
def test_paths_are_not_broken(
    inside: bool, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = tmp_path / ("long-name-" * 8) / "runs [v2]"
    runs.parent.mkdir()
    monkeypatch.chdir(runs.parent if inside else tmp_path.parent)
    fit(photos, runs if inside else runs.absolute())
    folder = runs / "version_0"
    shown = folder.relative_to(Path.cwd())
    printed = capsys.readouterr().out.splitlines()
    assert f"  best model   {shown / 'checkpoints' / 'best.ckpt'}" in printed
    assert f"  outputs      {shown}" in printed


def test_long_rows_are_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table("title", {"a": "word " * 12, "name": "[red]"})
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "  a     word word word word word word",
        "        word word word word word word",
        "  name  [red]",
    ]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_checkpoint_that_was_used_is_named(
    command: str, photos: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    main([command, f"--data.root={photos}", "--data.num_workers=0", "--trainer.accelerator=cpu", "--ckpt_path=last"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "checkpoint " in line]
    assert row.split() == ["checkpoint", str(Path("runs/version_0/checkpoints/last.ckpt"))]


def test_checkpoint_that_does_not_exist(photos: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    folder = Path("runs/version_0/checkpoints")
    for path, said in (
        (
            folder / "bst.ckpt",
            f"does not exist; did you mean 'best.ckpt' or 'last.ckpt'? {folder} has best.ckpt, last.ckpt",
        ),
        (folder.parent, f"a folder; give one of its checkpoints: {folder / 'best.ckpt'}, {folder / 'last.ckpt'}"),
        (Path("runs") / "best.ckpt", "does not exist; there is none in 'runs'"),
        (Path("nowhere") / "best.ckpt", "does not exist; there is no folder 'nowhere'"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            main(["test", f"--data.root={photos}", f"--ckpt_path={path}"])
        assert said in str(caught.value)


@pytest.mark.parametrize(("limit", "reached"), [("max_epochs", 2), ("max_steps", 1)])
def test_complete_run_says_how_it_would_go_on(
    limit: str, reached: int, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.max_epochs=2", f"--trainer.{limit}={reached}"]
    fit(photos, tmp_path, *options)
    assert "the run is complete" not in capsys.readouterr().out
    fit(photos, tmp_path, *options, f"--ckpt_path={tmp_path / 'version_0' / 'checkpoints' / 'last.ckpt'}")
    printed = capsys.readouterr().out
    assert "the run is complete" in printed
    assert f"resume with   the same command and --trainer.{limit} N, above {reached}\n" in printed


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line(workers: int, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", {"ant": 6, "bee": 6})
    for broken in photos.rglob("*.png"):
        broken.write_bytes(broken.read_bytes()[:90])
    with pytest.raises(ValueError, match="cannot read the image") as caught:
        fit(photos, tmp_path / "runs", f"--data.num_workers={workers}")
    assert len(str(caught.value).splitlines()) == 1
    shown = "".join(traceback.format_exception(caught.value))
    assert "in read_image" in shown, "the place where it was raised is lost"


def _fails(image: torch.Tensor) -> torch.Tensor:
    raise LookupError("a mistake in a transform of one's own")


def test_mistake_in_ones_own_code_keeps_its_traceback() -> None:
    dataset = ImageDataset(lambda _: torch.zeros(3, 4, 4, dtype=torch.uint8), [0, 1], _fails, seed=0)
    loader = ImageLoader(dataset, DistributedBatchSampler(2, 2, shuffle=False), num_workers=1, pin_memory=False)
    with pytest.raises(LookupError, match=r"(?s)Traceback.*in _fails.*a mistake in a transform of one's own"):
        next(iter(loader))
    loader.close()


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model=LinearProbe"], "model: PartialFineTuning in the checkpoint, LinearProbe now"),
        (
            ["--backbone=TorchvisionBackbone", "--backbone.name=resnet18", "--backbone.weights=null", *PARTIAL],
            "backbone: TinyBackbone in the checkpoint, TorchvisionBackbone now",
        ),
        ([BACKBONE, *PARTIAL, "--backbone.dropout=0.1"], "backbone.dropout: 0.3 in the checkpoint, 0.1 now"),
        ([*PARTIAL, "--model.unfreeze_from=layer3"], "model.unfreeze_from: 'layer2' in the checkpoint, 'layer3' now"),
        ([*PARTIAL, "--model.head=MLPHead"], "model.head: None in the checkpoint, MLPHead"),
    ],
)
def test_another_model_does_not_resume(
    options: list[str], said: str, photos: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(ValueError, match="was trained with another model") as caught:
        fit(photos, tmp_path, "--ckpt_path=runs/version_0/checkpoints/last.ckpt", *options)
    message = str(caught.value)
    assert said in message
    assert f"--config {Path('runs/version_0/config.yaml')}" in message
    assert len(message.splitlines()) < 6
    assert not list(tmp_path.iterdir())


def test_other_classes_do_not_resume(run: Path, tmp_path: Path) -> None:
    more = image_folder(tmp_path / "photos", {"ant": 12, "bee": 16, "cat": 13, "dog": 12})
    with pytest.raises(ValueError, match="was trained with another model") as caught:
        fit(more, tmp_path, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", *PARTIAL)
    said = "classes of the data: 3 (ant, bee, cat) in the checkpoint, 4 (ant, bee, cat and 1 more) now"
    assert said in str(caught.value)


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_other_rates_resume(photos: Path, tmp_path: Path) -> None:
    fit(photos, tmp_path, *PARTIAL)
    checkpoint = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="the learning rate of layer3 is 1e-05 now"):
        fit(
            photos,
            tmp_path,
            f"--ckpt_path={checkpoint}",
            *PARTIAL,
            "--trainer.max_epochs=2",
            "--model.backbone_lr=1e-5",
        )
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "CachedFeaturesDataModule needs 'images.root': add --data.images.root FOLDER"),
        (
            ["--data.images=photos"],
            "--data.images is photos, which is no class of images; a folder is named by --data.images.root",
        ),
        (["--data.images.root=x", "--lr=0.01"], "--lr is 0.01; it is a list, as '[0.001, 0.01]'"),
        (["--data.images.root=x", "--lr=[1e-2"], "--lr is [1e-2; it is a list"),
        (["--data.images.root=x", "--weight_decay=x"], "--weight_decay is x; it is a list, as '[0.0, 1.0]'"),
        (["--data.images.root=x", "--boundaries=layer3"], "--boundaries is layer3; it is a list of stages"),
        (
            ["--data.images.root=x", "--heads=LinearHead"],
            "--heads is LinearHead; it is a list of classes, as '[{class_path: L",
        ),
        (["--data.images.root=x", "--heads=[NoHead]"], "it is a list of classes, as '[{class_path: LinearHead}"),
    ],
)
def test_options_of_a_sweep(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in _refused(capsys, "sweep", *options)
