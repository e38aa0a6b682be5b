"""What a run has where its user has not chosen: checkpoints, precision, loggers."""

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


def best_and_last() -> list[Callback]:
    """Build the checkpoint callbacks: ``best.ckpt`` by validation macro F1, ``last.ckpt`` after every epoch.

    They are two, since Lightning's ``save_last`` saves only when the monitored score has improved.
    """
    return [
        ModelCheckpoint(filename="best", monitor="val_f1", mode="max", enable_version_counter=False),
        ModelCheckpoint(filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
    ]


def default_precision(accelerator: str) -> str:
    """Choose mixed precision on a CUDA device, bfloat16 where it is native, and single precision elsewhere."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def default_loggers(folder: Path) -> list[Logger]:
    """Build a CSV logger, and one for TensorBoard where that is installed, that write to one folder.

    The metrics of the run that is resumed there are kept as ``metrics-1.csv`` and so on; Lightning would delete them.
    """
    _set_aside(folder / "metrics.csv")
    place: dict[str, Any] = {"save_dir": folder.parent, "name": "", "version": folder.name}
    loggers: list[Logger] = [CSVLogger(**place)]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(**place))
    return loggers


@rank_zero_only
def _set_aside(file: Path) -> None:
    if file.is_file():
        number = next(n for n in itertools.count(1) if not file.with_stem(f"{file.stem}-{n}").exists())
        file.rename(file.with_stem(f"{file.stem}-{number}"))
