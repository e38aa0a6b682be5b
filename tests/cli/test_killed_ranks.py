"""A rank that is killed ends the other ranks, at the start as well as in training."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.benchmarks.kills import last_checkpoint, members, rank_process, start

LIMIT_S = 120.0


def _wait_until(condition: object, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "training"])
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_other_one(victim: int, moment: str, photos: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = start(photos, runs, 2, "--trainer.max_epochs=500")
    try:
        _wait_until(lambda: rank_process(process, 1) != process.pid, "rank 1 was not started")
        if moment == "training":
            _wait_until(lambda: last_checkpoint(runs), "no epoch was trained")
        os.kill(rank_process(process, victim), signal.SIGKILL)
        assert process.wait(30) != 0
        killed = time.monotonic()
        while members(process.pid):
            assert time.monotonic() < killed + 10, f"processes are left: {members(process.pid)}"
            time.sleep(0.05)
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
