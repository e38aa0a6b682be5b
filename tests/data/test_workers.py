"""Worker processes end at once with the main process, however that one ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAYS = ("end", "error", "SIGTERM", "SIGKILL", "SIGINT", "worker")

CODE = """
import json, os, signal, sys, time
from pathlib import Path
from tests.staged import images

def alive(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(") ")[2][0] != "Z"

def load_and_end(photos, file, how):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs
    data = images(photos, num_workers=2, batch_size=2)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
    Path(file).write_text(" ".join(children))
    if how == "error":
        raise RuntimeError("in the main process")
    if how in ("SIGTERM", "SIGKILL", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, how))
    if how == "worker":
        os.kill(int(children[0]), signal.SIGKILL)
        time.sleep(0.2)
        raise RuntimeError("a worker is gone")
    return batches

photos, folder, *ways = sys.argv[1:]
for how in ways:
    file = f"{folder}/{how}"
    process = os.fork()  # imports take seconds, so that all main processes share them
    if process == 0:
        batches = load_and_end(photos, file, how)
        break
    while not os.path.exists(file) and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.01)
    begun = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    workers = Path(file).read_text().split()
    while any(map(alive, workers)) and time.monotonic() < begun + 25:
        time.sleep(0.05)
    print(json.dumps([how, len(workers), status, time.monotonic() - begun]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int, float]]:
    """End a main process in each way; return its number of workers, its exit code, and the seconds until all ended."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "script.py").write_text(CODE)
    command = [sys.executable, str(folder / "script.py"), str(photos), str(folder), *WAYS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(  # noqa: S603 - our own interpreter
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout
    return {how: (workers, status, seconds) for how, workers, status, seconds in map(json.loads, output.splitlines())}


@pytest.mark.parametrize("how", WAYS)
def test_no_worker_outlives_the_main_process(how: str, ended: dict[str, tuple[int, int, float]]) -> None:
    workers, status, seconds = ended[how]
    assert workers == 2
    assert seconds < 20, "the workers waited until their grace period after SIGTERM was over"
    assert status == (-getattr(signal, how) if how.startswith("SIG") else how != "end")
