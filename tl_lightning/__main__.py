"""``python -m tl_lightning`` and the console script ``tl-lightning``."""

import os
import signal
import sys


def main() -> None:
    """Run the command line on the arguments of the process; a mistake of the user's is one message, not a traceback."""
    sys.path.append(os.getcwd())  # classes of the user's own, as 'my_module.MyProbe'; last, so that they hide nothing
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from tl_lightning.cli import main as run
    from tl_lightning.utils.messages import own_message

    try:
        run()
    except SIGTERMException:
        # Lightning kills the first process of a node when it finds that another has failed, so those end quietly.
        sys.exit(128 + signal.SIGTERM if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    except KeyboardInterrupt:  # outside of a fit, where Lightning ends the run itself
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = own_message(error)
        if message is None or os.environ.get("TL_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"tl-lightning: error: {message}")


if __name__ == "__main__":
    main()
