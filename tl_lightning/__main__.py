"""Run ``python -m tl_lightning`` and the console script ``tl-lightning``."""

import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from tl_lightning import __version__
from tl_lightning.utils.launcher import end_with_launcher


def main() -> None:
    """Run the command line on the arguments of the process, and print an expected error without its traceback."""
    end_with_launcher()  # before the imports, which take seconds
    if sys.argv[1:] == ["--version"]:  # before Lightning is imported, which takes seconds
        print(f"tl-lightning {__version__}")
        return
    before = {number: signal.signal(number, _leave_at_once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _run(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(before: Mapping[signal.Signals, Any]) -> None:
    """Import the command line, and run it.

    Args:
        before: The handlers of signals from before the imports.
    """
    sys.path.append(os.getcwd())  # classes of the user's own, as 'my_module.MyProbe'; last, so that they hide nothing
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from tl_lightning.cli import TransferCLI
    from tl_lightning.cli import main as run
    from tl_lightning.cli.exit_codes import explain_failure
    from tl_lightning.lightning_fixes.finite_guard import NotFiniteError

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(128 + number)  # outside training a rank ends alone, and the others must not wait for it
        raise SIGTERMException

    signal.signal(signal.SIGINT, before[signal.SIGINT])
    signal.signal(signal.SIGTERM, terminate)
    try:
        run()
    except SIGTERMException:
        # If one process of a node fails, Lightning kills the first. The others exit with 0, so that one failure counts.
        sys.exit(128 + signal.SIGTERM if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # within a run, Lightning turns it into exit code 1
            sys.exit(128 + signal.SIGINT)
        raise
    except Exception as error:
        if isinstance(error, NotFiniteError) and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(0)  # all ranks raise it, so the first one fails for all, as above
        explained = explain_failure(error, has_begun=TransferCLI.has_begun)
        if explained is None or os.environ.get("TL_LIGHTNING_TRACEBACK"):
            raise
        message, code = explained
        print(f"tl-lightning: error: {message}", file=sys.stderr)
        sys.exit(code)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """End the process during the imports, which would turn an exception of a signal handler into other errors."""
    os._exit(128 + number)


if __name__ == "__main__":
    main()
