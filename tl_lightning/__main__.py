"""Run ``python -m tl_lightning`` and the console script ``tl-lightning``."""

import os
import signal
import sys

from tl_lightning import __version__
from tl_lightning.utils.launcher import end_with_launcher


def main() -> None:
    """Run the command line on the arguments of the process, and print an expected error without its traceback."""
    end_with_launcher()  # before the imports, which take seconds
    if sys.argv[1:] == ["--version"]:  # before Lightning is imported, which takes seconds
        print(f"tl-lightning {__version__}")
        return
    sys.path.append(os.getcwd())  # classes of the user's own, as 'my_module.MyProbe'; last, so that they hide nothing
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from tl_lightning.cli import main as run
    from tl_lightning.utils.messages import package_error_message

    try:
        run()
    except SIGTERMException:
        # If one process of a node fails, Lightning kills the first. The others exit with 0, so that one failure counts.
        sys.exit(128 + signal.SIGTERM if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    except KeyboardInterrupt:  # outside fit, where Lightning itself ends the run
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = package_error_message(error)
        if message is None or os.environ.get("TL_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"tl-lightning: error: {message}")


if __name__ == "__main__":
    main()
