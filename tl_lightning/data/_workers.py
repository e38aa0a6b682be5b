"""Worker processes: their signals and forks."""

import os
import signal
import sys
import threading
import time

import torch.distributed as dist

_REST_S = 0.05
_GRACE_S = 30


def outlive_sigterm(_worker: int) -> None:
    """Let a worker process go on for a while after SIGTERM, unless the main process sends it.

    Some schedulers send it to all processes of a job. The main one then ends the run after the batch at hand, for which it
    needs its workers. Who has sent a signal is told to those that wait for it alone, so a thread does.
    """
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, daemon=True).start()


def _wait_for_sigterm() -> None:
    if sys.platform == "linux":
        told = signal.sigwaitinfo({signal.SIGTERM})
        if told.si_pid != os.getppid():
            signal.sigtimedwait({signal.SIGTERM}, _GRACE_S)
        os._exit(0)


def wait_until_safe_to_fork() -> None:
    """Let the threads of the last collective operation come to rest before worker processes are forked.

    When one has just ended, a thread of torch.distributed frees its tensors, for which it registers with Python. Before
    Python 3.12 a process forked at that very moment waits for ever for the lock that this takes: ``PyOS_AfterFork_Child``
    makes that lock anew only after it has used it.
    """
    if sys.version_info < (3, 12) and dist.is_available() and dist.is_initialized():
        time.sleep(_REST_S)
