"""Keep worker processes alive after SIGTERM, fork them safely, and explain why one has died."""

import errno
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from types import FrameType

import torch.distributed as dist
from torch.utils.data._utils import signal_handling

_REST_S = 0.05
_GRACE_S = 30
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where Linux keeps shared memory
_NO_SHARED_MEMORY, _NO_DESCRIPTORS, _CANNOT_SEND = 74, 75, 76
"""Exit codes of a worker process that cannot send a batch."""


class WorkerError(RuntimeError):
    """Report a worker process that has died; the message says why, as far as it is known, and what to do."""


def prepare_worker(_worker: int) -> None:
    """Prepare a worker process for SIGTERM, and for batches that cannot be sent."""
    _delay_sigterm()
    # A thread of the worker sends the batches. Python prints its errors and goes on, so that the main process would
    # wait for the batch for ever: https://github.com/python/cpython/blob/main/Lib/multiprocessing/queues.py, `_feed`
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, _batch: object) -> None:
    if "shared memory" in str(error) or "No space left" in str(error):
        os._exit(_NO_SHARED_MEMORY)
    if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
        os._exit(_NO_DESCRIPTORS)
    traceback.print_exception(error)
    os._exit(_CANNOT_SEND)


def _delay_sigterm() -> None:
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


def watch_workers() -> None:
    """Explain the death of a worker process wherever torch reports it: in a signal handler, at any place of a run.

    torch sets its handler once for a process (``torch/utils/data/_utils/signal_handling.py``,
    https://github.com/pytorch/pytorch), and Lightning removes it at the end of each ``fit``
    (``lightning/pytorch/trainer/connectors/signal_connector.py``, ``teardown``).
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return  # where torch sets no handler either
    present = getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")
    if present == __name__:
        return
    if present != signal_handling.__name__:
        signal_handling._SIGCHLD_handler_set = False
    signal_handling._set_SIGCHLD_handler()
    report = signal.getsignal(signal.SIGCHLD)
    if not callable(report):
        return

    def explain(number: int, frame: FrameType | None) -> None:
        try:
            report(number, frame)
        except RuntimeError as error:
            raise explain_death(error) from error

    signal.signal(signal.SIGCHLD, explain)


def explain_death(error: RuntimeError) -> RuntimeError:
    """Return an error that says why a worker process has died, and what to do; another error is returned as it is."""
    if isinstance(error.__cause__, WorkerError):  # torch catches the error of the signal handler and raises another one
        return WorkerError(str(error.__cause__))
    found = re.search(
        r"DataLoader worker \(pid.*?\) (?:is killed by signal: (.+?)\. |exited .*?exit code (\d+))", str(error)
    )
    if found is None and "DataLoader worker (pid" not in str(error):
        return error
    killed, code = found.groups() if found else (None, None)
    fewer = "set data.num_workers lower, or to 0 to load images in the main process"
    if code == str(_NO_SHARED_MEMORY) or killed == "Bus error":
        size = shutil.disk_usage(_SHARED_MEMORY).total / 2**20 if os.path.isdir(_SHARED_MEMORY) else 0
        return WorkerError(
            f"the shared memory ({_SHARED_MEMORY}, {size:,.0f} MiB) is too small for the worker processes that load "
            f"images: {fewer}, or give more, as by docker run --shm-size=8g"
        )
    if code == str(_NO_DESCRIPTORS):
        return WorkerError(
            "a worker process cannot send its images, because too many files are open: raise the limit, as by "
            f"ulimit -n 65536, or {fewer}"
        )
    if killed == "Killed":
        return WorkerError(
            "a worker process that loads images was killed (Killed), as the system does when the memory is full: "
            f"{fewer}, or give the run more memory"
        )
    ended = f"died ({killed})" if killed else f"ended with exit code {code}" if code else "ended"
    return WorkerError(f"a worker process that loads images {ended}: {fewer}, which shows the error if there is one")
