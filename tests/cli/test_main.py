"""The program, in processes of its own: its name, its version, its exit codes, and signals."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import tl_lightning
from tests.cli.runs import BACKBONE
from tl_lightning import __main__
from tl_lightning.cli import main

ROOT = Path(__file__).parents[2]
CONSOLE_SCRIPT = Path(sys.executable).with_name("tl-lightning")


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


@pytest.mark.parametrize("program", [[sys.executable, "-X", "importtime", "-m", "tl_lightning"], [CONSOLE_SCRIPT]])
def test_version_is_printed_without_importing_lightning_or_torch(program: list[str]) -> None:
    done = subprocess.run([*program, "--version"], check=True, capture_output=True, text=True)  # noqa: S603 - our own program
    assert done.stdout == f"tl-lightning {tl_lightning.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "lightning.pytorch", "jsonargparse"}


def test_parser_knows_the_version_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tl-lightning {tl_lightning.__version__}\n"


def test_installed_metadata_and_the_citation_have_the_same_version() -> None:
    assert version("tl_lightning") == tl_lightning.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == tl_lightning.__version__


@pytest.mark.parametrize("arguments", [[], ["fit", "--maxepochs=3"], ["fit", "--data.root=nowhere", BACKBONE]])
def test_mistake_is_one_message_under_the_name_of_the_program(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/lib/tl_lightning/__main__.py", *arguments])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    printed = capsys.readouterr().err.removeprefix("Seed set to 42\n")
    message = f"{printed}{caught.value.code if isinstance(caught.value.code, str) else ''}"
    (first, *rest) = message.splitlines()
    assert first.startswith("tl-lightning: error: ")
    assert len(rest) < 2
    assert "__main__" not in message


def test_failed_command_ends_with_one_message_and_without_a_traceback(tmp_path: Path) -> None:
    with start("test", "--data.root=x", "--ckpt_path=none.ckpt", cwd=tmp_path) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    expected = "tl-lightning: error: the checkpoint 'none.ckpt' does not exist; the folder '.' contains no checkpoint"
    assert err.removeprefix("Seed set to 42\n").splitlines() == [expected]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_imports_ends_the_program_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with start("fit", "--data.root=x", cwd=tmp_path) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", "")


def running(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, of, *_ = stat.read_text().rpartition(") ")[2].split()
            found += [stat.parent.name] * (int(of) == group and state != "Z")
    return found


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        (1, "group"),
        pytest.param(2, "first", marks=pytest.mark.slow),
        pytest.param(2, "all", marks=pytest.mark.slow),
        (2, "group"),
    ],
)
def test_terminated_run_says_how_to_resume(devices: int, told: str, photos: Path, tmp_path: Path) -> None:
    """A cluster tells the first process, or that of each rank, or every process, those that load images included."""
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


OWN_MODULE = """
from torch import nn
from tl_lightning.modules import LinearProbe

class SmoothedProbe(LinearProbe):
    def compute_loss(self, logits, target):
        return nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
"""


def test_class_in_the_current_folder_trains_and_predicts_once_it_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_probes.py").write_text(OWN_MODULE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    data = [f"--data.root={photos}", "--data.num_workers=0"]
    trust = [BACKBONE, "--model=my_probes.SmoothedProbe"]

    def run(*args: str) -> str:
        done = subprocess.run(  # noqa: S603 - our own script
            [CONSOLE_SCRIPT, *args], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("fit", *trust, *data, "--trainer.max_epochs=1")
    assert "predictions.csv" in run("predict", *data, "--ckpt_path=best", *trust)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"names the class 'my_probes\.SmoothedProbe'") as caught:
        main(["predict", *data, "--ckpt_path=best"])
    assert "add --model my_probes.SmoothedProbe or --config runs/version_0/config.yaml" in str(caught.value)
    with pytest.raises(ValueError, match="there is no module 'my_absent_module'"):
        main(["predict", *data, "--ckpt_path=best", "--model=my_absent_module.Probe"])
    monkeypatch.syspath_prepend(tmp_path)
    try:
        main(["predict", *data, "--ckpt_path=best", "--config=runs/version_0/config.yaml"])
    finally:
        sys.modules.pop("my_probes", None)
    assert len(list(tmp_path.rglob("predictions.csv"))) == 2
