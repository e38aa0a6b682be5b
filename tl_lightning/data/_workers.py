"""Keep worker processes alive after SIGTERM, and fork them safely."""

import os
import signal
import sys
import threading
import time

import torch.distributed as dist

_REST_S = 0.05
_GRACE_S = 30


def delay_sigterm(_worker: int) -> None:
    """Keep a worker process alive for a while after SIGTERM, unless the main process has sent it.

    Some schedulers send SIGTERM to all processes of a job. The main process then ends the run after the current batch,
    and needs its workers until then. Only ``sigwaitinfo`` reveals the sender of a signal, so a thread waits for it.
    """
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, daemon=True).start()


def _wait_for_sigterm() -> None:
    if sys.platform == "linux":
        received = signal.sigwaitinfo({signal.SIGTERM})
        if received.si_pid != os.getppid():
            signal.sigtimedwait({signal.SIGTERM}, _GRACE_S)
        os._exit(0)


def wait_until_safe_to_fork() -> None:
    """Let the threads of the last collective operation come to rest before worker processes are forked.

    Right after such an operation, a thread of torch.distributed frees its tensors and registers with Python to do so.
    Before Python 3.12, a process forked at that moment waits for ever for the lock that this takes:
    ``PyOS_AfterFork_Child`` replaces that lock only after it has used it.
    """
    if sys.version_info < (3, 12) and dist.is_available() and dist.is_initialized():
        time.sleep(_REST_S)
