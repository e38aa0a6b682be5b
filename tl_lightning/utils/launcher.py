"""End the processes of the other ranks together with the process that has launched them.

Lightning starts the script once more for each further rank of a machine, and these processes outlive a killed rank 0:
https://github.com/Lightning-AI/pytorch-lightning/tree/master/src/lightning/pytorch/strategies/launchers
(``subprocess_script.py``).
This module imports the standard library alone, so that a process can call it before its long imports.
"""

import ctypes
import os
import signal
import sys

_LAUNCHER = "TL_LIGHTNING_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """Let this process end with the process that has launched it for a further rank.

    The first process of a machine leaves its number for the processes that it will launch. Processes that another
    launcher has started, as ``torchrun`` or a cluster's scheduler, are left to that launcher.
    """
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    launcher = int(os.environ.get(_LAUNCHER) or 0)
    if not launcher or "TORCHELASTIC_RUN_ID" in os.environ or sys.platform != "linux":
        return
    if os.getppid() == launcher:
        # The kernel sends it when the parent ends: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher and not _is_running(launcher):
        sys.stderr.write("the process that has launched this one has ended, so this one ends too\n")
        os._exit(1)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
