"""Worker processes end at once with the main process, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """
import os, signal, sys, time
from tests.staged import images
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs
    data = images(sys.argv[1], num_workers=2, batch_size=2)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    how = sys.argv[2]
    children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
    print(*children, flush=True)
    if how == "error":
        raise RuntimeError("in the main process")
    if how in ("SIGTERM", "SIGKILL", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, how))
    if how == "worker":
        os.kill(int(children[0]), signal.SIGKILL)
        time.sleep(0.2)
        raise RuntimeError("a worker is gone")
"""


def alive(process: str) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.parametrize("how", ["end", "error", "SIGTERM", "SIGKILL", "SIGINT", "worker"])
def test_no_worker_outlives_the_main_process(how: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CODE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), str(photos), how]
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        workers = process.stdout.readline().split()
        begun = time.monotonic()
        process.stdout.read()
        process.wait()
        while any(map(alive, workers)) and time.monotonic() < begun + 25:
            time.sleep(0.05)
    assert len(workers) == 2
    assert time.monotonic() - begun < 20, "the workers waited until their grace period after SIGTERM was over"
    assert process.returncode == (-getattr(signal, how) if how.startswith("SIG") else how != "end")
