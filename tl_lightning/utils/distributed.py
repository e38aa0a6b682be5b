"""What the ranks of a run do together; on one process, nothing."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout

_T = TypeVar("_T")

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order
_PATIENCE_S = 20.0  # far less than the time after which a collective operation is given up


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process() -> bool:
    """Return whether this is the process of rank 0, also before the processes are connected."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    ranks = (os.environ.get(name) for name in _RANK_VARIABLES)
    return int(next((rank for rank in ranks if rank), "0")) == 0


def broadcast_object(value: _T) -> _T:
    """Return what the first rank has."""
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: _T) -> list[_T]:
    """Return what each rank has."""
    world = rank_and_world_size()[1]
    if world == 1:
        return [value]
    found: list[_T] = [value] * world
    dist.all_gather_object(found, value)
    return found


@contextmanager
def synchronize_errors() -> Iterator[None]:
    """Wait for all ranks at the end of the block, and raise on each of them if one has failed, so that none waits for ever.

    Raises:
        Exception: The error of this rank.
        RuntimeError: Another rank failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001 - the other ranks are to hear of it, whatever it is
        error = raised
    messages = all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed with {message}")


@contextmanager
def locked(locks: Sequence[FileLock], what: str) -> Iterator[None]:
    """Hold locks, for all ranks; where another run holds one, say so and wait.

    Args:
        locks: In an order that all runs agree on.
        what: What the other run is doing.
    """
    with ExitStack() as held:
        for lock in locks:
            got = told = False
            while not got:
                with synchronize_errors():
                    got = _try(lock, held, told)
                got = broadcast_object(got)
                if not (got or told) and rank_and_world_size()[0] == 0:
                    print(f"another run is {what}; waiting for it", flush=True)
                told = True
        yield


def _try(lock: FileLock, held: ExitStack, told: bool) -> bool:
    if rank_and_world_size()[0] != 0:
        return False  # the first rank's answer counts
    try:
        lock.acquire(timeout=_PATIENCE_S if told else 1.0)
    except Timeout:
        return False
    held.callback(lock.release)
    return True
