"""A process that was launched for a further rank ends with its launcher, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]

_LAUNCHED = """
import sys, time
from tl_lightning.utils.launcher import end_with_launcher
time.sleep(float(sys.argv[1]))
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""

_LAUNCHER = f"""
import os, subprocess, sys, time
from tl_lightning.utils.launcher import end_with_launcher
end_with_launcher()
environment = dict(os.environ, LOCAL_RANK="1")
child = subprocess.Popen([sys.executable, "-c", {_LAUNCHED!r}, sys.argv[1]], env=environment)
print(child.pid, flush=True)
time.sleep(60)
"""


@contextmanager
def _launch(delay_s: float) -> Iterator[tuple["subprocess.Popen[str]", IO[str], int]]:
    """Start a launcher, and give it, its output, and the number of the process that it has launched."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _LAUNCHER, str(delay_s)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        yield launcher, launcher.stdout, int(launcher.stdout.readline())


def _is_gone(pid: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a process that its parent has ended")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_launched_process_ends_with_its_launcher(sent: signal.Signals) -> None:
    with _launch(0) as (launcher, printed, launched):
        assert printed.readline() == "ready\n"
        launcher.send_signal(sent)
        launcher.wait()
        assert _is_gone(launched, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a process that its parent has ended")
def test_process_whose_launcher_has_ended_before_it_started_ends_at_once() -> None:
    with _launch(0.5) as (launcher, _, launched):
        launcher.kill()
        launcher.wait()
        assert _is_gone(launched, 10)
