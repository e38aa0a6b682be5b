"""A rank that is killed ends the other ranks, at the start as well as in training."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.kills import last_checkpoint, members, rank_process, start

LIMIT_S = 120.0


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "victim", "sent"),
    [
        ("start", 0, signal.SIGKILL),
        ("start", 0, signal.SIGTERM),
        ("start", 1, signal.SIGKILL),
        ("training", 0, signal.SIGKILL),
        ("training", 1, signal.SIGKILL),
    ],
)
def test_killed_rank_ends_the_other_one(
    moment: str, victim: int, sent: signal.Signals, photos: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    process = start(photos, runs, 2, "--trainer.max_epochs=500")
    try:
        _wait_until(lambda: rank_process(process, 1) != process.pid, "rank 1 was not started")
        if moment == "training":
            _wait_until(lambda: last_checkpoint(runs), "no epoch was trained")
        else:
            time.sleep(1)  # rank 0 waits for the other one
        os.kill(rank_process(process, victim), sent)
        assert process.wait(10 if victim == 0 else 30) != 0
        killed = time.monotonic()
        while members(process.pid):
            assert time.monotonic() < killed + 10, f"processes are left: {members(process.pid)}"
            time.sleep(0.05)
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
