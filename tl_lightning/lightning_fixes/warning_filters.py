"""Leave out warnings and messages of Lightning that every sound run of the command line would show.

Lightning warns of frozen modules in eval mode, of few batches and of the files of a resumed run. It also advertises
services (https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/pytorch/loops/fit_loop.py,
``_warn_if_modules_in_eval_mode``; the other places are named below). It has no option to say that these are intended.
Needed for Lightning 2.6. An entry can be deleted when Lightning no longer shows it, and this file when none is left.
"""

import logging
import warnings
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

_EXPECTED_WARNINGS = (
    # A frozen backbone belongs in eval mode: lightning.pytorch.loops.fit_loop.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Metrics are logged per epoch: lightning.pytorch.loops.fit_loop.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # The folder of a resumed run holds its earlier checkpoints: lightning.pytorch.callbacks.model_checkpoint.
    r"Checkpoint directory .* exists and is not empty",
    # It also holds its earlier metrics, which ResumableCSVLogger keeps: lightning.fabric.loggers.csv_logs.
    r"Experiment logs directory .* exists and is not empty",
    # Validating, testing and predicting need no callbacks of training: lightning.pytorch.trainer.call.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    # Lightning uses a name that newer versions of torch deprecate: lightning.pytorch.utilities._pytree.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Predictions are matched by index, not by sampler: lightning.pytorch.loops.prediction_loop.
    r"Couldn't infer the batch indices fetched from your dataloader",
)

_HIDDEN_MESSAGES = (
    "\N{ELECTRIC LIGHT BULB} Tip",
    "TPU available",
    "GPU available",
    "Loading `",
    "Restoring states",
    "Loaded model weights",
    "The following callbacks returned",
    "`Trainer.fit` stopped: `max_epochs=",  # it breaks the line of the progress bar, and the summary follows
)
"""Beginnings of log messages that the user of the command line does not need."""

_default_format = warnings.formatwarning


def filter_warnings() -> None:
    """Hide expected warnings and advertisements, and show this package's warnings without their place in the code."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = _format_warning
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_HIDDEN_MESSAGES)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning of this package as its message alone, and any other warning as usual."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"{message}\n"
    return _default_format(message, category, filename, lineno, line)
