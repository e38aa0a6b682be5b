"""``python -m tl_lightning`` and the console script ``tl-lightning``."""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Run the command line on the arguments of the process; a mistake of the user's is one message, not a traceback."""
    sys.path.append(os.getcwd())  # classes of the user's own, as 'my_module.MyProbe'; last, so that they hide nothing
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from tl_lightning.cli import main as run

    try:
        run()
    except SIGTERMException:
        # Lightning kills the first process of a node when it finds that another has failed, so those end quietly.
        sys.exit(128 + signal.SIGTERM if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    except Exception as error:
        message = _of_ours(error)
        if message is None or os.environ.get("TL_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"tl-lightning: error: {message}")


def _of_ours(error: BaseException) -> str | None:
    """Return the message of the exception that this package raised to tell the user something, if one did."""
    found: BaseException | None = error
    while found is not None:
        trace = found.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent):
            return str(found)
        found = found.__cause__ or found.__context__
    return None


if __name__ == "__main__":
    main()
