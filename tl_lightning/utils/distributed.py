"""Communicate between the ranks of a run; on one process, all of this does nothing."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout

_T = TypeVar("_T")

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order
_LOCK_TIMEOUT_S = 20.0  # far below the timeout of a collective operation, in which the other ranks wait


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_rank_zero() -> bool:
    """Return whether this process has rank 0, also before the processes are connected."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    ranks = (os.environ.get(name) for name in _RANK_VARIABLES)
    return int(next((rank for rank in ranks if rank), "0")) == 0


def broadcast_object(value: _T) -> _T:
    """Return the value that rank 0 passes."""
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: _T) -> list[_T]:
    """Return the values that all ranks pass, by rank."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    gathered: list[_T] = [value] * world_size
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Wait for all ranks at the end of the block, and raise on each of them if one failed, so that none waits for ever.

    Raises:
        Exception: The error of this rank.
        RuntimeError: Another rank failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001 - the other ranks have to know of any error
        error = raised
    messages = all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed with {message}")


@contextmanager
def hold_file_locks(locks: Sequence[FileLock], activity: str) -> Iterator[None]:
    """Hold file locks on rank 0 while all ranks run the block; if another run holds one, print that, and wait.

    Args:
        locks: The locks, in an order that all runs share, so that two runs cannot wait for each other.
        activity: The work under the locks, for the message.
    """
    with ExitStack() as held:
        for lock in locks:
            acquired = announced = False
            while not acquired:
                with raise_on_all_ranks():
                    acquired = _try_acquire(lock, held, _LOCK_TIMEOUT_S if announced else 1.0)
                acquired = broadcast_object(acquired)
                if not (acquired or announced) and rank_and_world_size()[0] == 0:
                    print(f"another run is {activity}; waiting for it", flush=True)
                announced = True
        yield


def _try_acquire(lock: FileLock, held: ExitStack, timeout_s: float) -> bool:
    """Acquire a lock on rank 0, and leave its release to the exit stack; return False on timeout and on other ranks."""
    if rank_and_world_size()[0] != 0:
        return False
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        return False
    held.callback(lock.release)
    return True
