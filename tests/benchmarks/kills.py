"""Kill runs at random moments, from their start on, resume them, and compare their weights with an undisturbed run.

    python -m tests.benchmarks.kills --single 40 --ranks 20

Half of the kills are SIGKILL, half SIGTERM. Of two ranks, the victim is rank 0 or rank 1. The runs lie on
``/dev/shm``, so on another file system than the temporary files. A kill passes if nothing of the run is left after
10 s, ``last.ckpt`` is readable, and the run ends with the weights of the undisturbed run, bit for bit, after it was
resumed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.doubles import image_folder

ROOT = Path(__file__).parents[2]
LEFT_S = 10.0
LIMIT_S = 600.0
_FIT = (
    "fit --backbone=TimmBackbone --backbone.name=test_resnet --backbone.weights=null --model=PartialFineTuning "
    "--model.unfreeze_from=1 --model.train_bn=true --data.batch_size=8 --data.num_workers=1 --data.val_fraction=0.3 "
    "--trainer.max_epochs=8 --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
)


class Outcome(NamedTuple):
    """One kill, and the run after it."""

    moment: str
    seconds_left: float
    unreadable: bool
    equal: bool
    starts: int


def start(photos: Path, runs: Path, ranks: int, *options: str) -> subprocess.Popen[bytes]:
    """Start a fit in a session of its own, which its processes share."""
    command = [sys.executable, "-W", "ignore", "-m", "tl_lightning", *_FIT.split()]
    command += [f"--data.root={photos}", f"--trainer.default_root_dir={runs}", *options]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"] if ranks > 1 else ["--trainer.devices=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with runs.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def members(session: int) -> list[int]:
    """Return the living processes of a session, in the order of their start."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = folder.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == session and state != "Z":
            found.append(int(folder.name))
    return sorted(found)


def last_checkpoint(runs: Path) -> Path | None:
    """Return ``last.ckpt`` of the newest run that has one."""
    found = sorted(runs.glob("version_*/checkpoints/last.ckpt"), key=lambda file: int(file.parts[-3][8:]))
    return found[-1] if found else None


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint."""
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def finish(photos: Path, runs: Path, ranks: int) -> int:
    """Resume the run, or start again where it has no checkpoint, until it is complete; return the number of starts."""
    for starts in range(1, 4):
        resume = ["--ckpt_path=last"] if last_checkpoint(runs) else []
        process = start(photos, runs, ranks, *resume)
        if process.wait(LIMIT_S) == 0:
            return starts
    return 0


def rank_process(process: subprocess.Popen[bytes], rank: int) -> int:
    """Return the process of a rank, or rank 0 as long as that one has not been started."""
    for pid in members(process.pid):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == process.pid and f"LOCAL_RANK={rank}".encode() in environment:
            return pid
    return process.pid


def kill_once(
    photos: Path, runs: Path, ranks: int, after_s: float, number: int, expected: dict[str, Tensor]
) -> Outcome:
    """Start a run, kill a process of it after some time, and finish the run."""
    process = start(photos, runs, ranks)
    time.sleep(after_s)
    victim = process.pid if ranks == 1 else rank_process(process, number // 2 % 2)
    moment = "start" if last_checkpoint(runs) is None else "training"
    if process.poll() is not None:
        moment = "complete"
    try:
        os.kill(victim, signal.SIGKILL if number % 2 == 0 else signal.SIGTERM)
    except ProcessLookupError:
        moment = "complete"
    began = time.monotonic()
    while members(process.pid) and time.monotonic() - began < 10 * LEFT_S:
        process.poll()
        time.sleep(0.05)
    left = time.monotonic() - began
    for pid in members(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    unreadable = False
    for file in runs.glob("version_*/checkpoints/*.ckpt"):
        try:
            weights(file)
        except Exception as error:  # noqa: BLE001 - any error is a finding
            print(f"  {file.name}, {file.stat().st_size} bytes: {error}")
            unreadable = True
    starts = finish(photos, runs, ranks)
    final = last_checkpoint(runs)
    found = {} if final is None or not starts else weights(final)
    equal = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    return Outcome(moment, left, unreadable, equal, starts)


def kills(photos: Path, folder: Path, ranks: int, count: int, seed: int) -> bool:
    """Kill runs, print what became of each, and return whether all passed."""
    began = time.monotonic()
    assert start(photos, folder / "undisturbed", ranks).wait(LIMIT_S) == 0
    length = time.monotonic() - began
    final = last_checkpoint(folder / "undisturbed")
    assert final is not None
    expected, chance = weights(final), random.Random(seed)  # noqa: S311 - no secret
    print(f"{ranks} rank(s): the undisturbed run took {length:.0f} s", flush=True)
    bad, moments = 0, Counter[str]()
    times = [length * (i + chance.random()) / count for i in range(count)]  # spread over the whole run
    chance.shuffle(times)
    for number, after_s in enumerate(times):
        runs = folder / f"{ranks}-{number}"
        found = kill_once(photos, runs, ranks, after_s, number, expected)
        passed = found.seconds_left < LEFT_S and not found.unreadable and found.equal
        bad, moments[found.moment] = bad + (not passed), moments[found.moment] + 1
        name = "SIGKILL" if number % 2 == 0 else "SIGTERM"
        rank = f" rank {number // 2 % 2}" if ranks > 1 else ""
        print(f"{number:3} {name}{rank} after {after_s:5.1f} s: {'pass' if passed else 'FAIL'} {found}", flush=True)
        if passed:
            shutil.rmtree(runs, ignore_errors=True)
    print(f"{ranks} rank(s): {count - bad} of {count} passed; {dict(moments)}", flush=True)
    return bad == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=40, help="kills of runs of one process")
    parser.add_argument("--ranks", type=int, default=20, help="kills of runs of two ranks")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir="/dev/shm"))
    photos = image_folder(folder / "photos", {"ant": 12, "bee": 16, "cat": 13})
    passed = [
        kills(photos, folder, n, count, given.seed) for n, count in ((1, given.single), (2, given.ranks)) if count
    ]
    if not all(passed):
        sys.exit(f"some failed: see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
