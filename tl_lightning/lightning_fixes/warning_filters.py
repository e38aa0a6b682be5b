"""What Lightning says that a user of the command line need not read."""

import logging
import warnings
from pathlib import Path

_EXPECTED_WARNINGS = (
    # A frozen backbone belongs in eval mode: lightning.pytorch.loops.fit_loop._warn_if_modules_in_eval_mode.
    r"SearchResult \d+ module\(s\) in eval mode at the start of training",
    # Metrics are logged per epoch: lightning.pytorch.loops.fit_loop.setup_data.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # The folder of a resumed run holds its earlier checkpoints: lightning.pytorch.callbacks.model_checkpoint.
    r"Checkpoint directory .* exists and is not empty",
    # So it holds its earlier metrics, which ResumableCSVLogger keeps: lightning.fabric.loggers.csv_logs.
    r"Experiment logs directory .* exists and is not empty",
    # Scoring needs none of the callbacks of training: lightning.pytorch.trainer.call, _call_callbacks_on_load_checkpoint.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    # Lightning on a newer torch: lightning.pytorch.utilities._pytree.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Predictions are matched by index, not by sampler: lightning.pytorch.loops.prediction_loop.
    r"Couldn't infer the batch indices fetched from your dataloader",
)


_NOISE = (
    "\N{ELECTRIC LIGHT BULB} Tip",
    "TPU available",
    "GPU available",
    "Loading `",
    "Restoring states",
    "Loaded model weights",
    "The following callbacks returned",
)


def _worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


_plain = warnings.formatwarning


def _say(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Give a warning of ours without the place in the code that it comes from."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    return f"{message}\n" if ours else _plain(message, category, filename, lineno, line)


def filter_warnings() -> None:
    """Leave out warnings that every run would give, and advertisements."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = _say
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_reading)
