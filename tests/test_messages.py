"""What the command line says when something is wrong or ends early: what was given, what is allowed, what to do next."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tl_lightning.cli import main

ROOT = Path(__file__).parents[1]
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
    )


def fit(photos: Path, runs: Path, *more: str) -> None:
    """Fit by the command line, in this process."""
    common = [f"--data.root={photos}", "--data.num_workers=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    main(["fit", BACKBONE, *common, f"--trainer.default_root_dir={runs}", *more])


# Runs that end early --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_terminated_run_says_how_it_goes_on(devices: int, photos: Path, tmp_path: Path) -> None:
    arguments = [BACKBONE, f"--data.root={photos}", "--data.num_workers=0", "--trainer.enable_progress_bar=false"]
    arguments += ["--trainer.max_epochs=5000", "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    with start("fit", *arguments, cwd=tmp_path) as process:
        while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert out.count("interrupted") == 1
    assert "the same command and --ckpt_path" in out
    assert "Traceback" not in err
