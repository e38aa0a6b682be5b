"""What a run has where its user has not chosen: precision, loggers, its configuration in a file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from tl_lightning.lightning_fixes.metrics_log import ResumableCSVLogger


def default_precision(accelerator: str) -> str:
    """Choose mixed precision on a CUDA device, bfloat16 where it is native, and single precision elsewhere."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def default_loggers(folder: Path) -> list[Logger]:
    """Build a CSV logger, and one for TensorBoard where that is installed, that write to one folder."""
    place: dict[str, Any] = {"save_dir": folder.parent, "name": "", "version": folder.name}
    loggers: list[Logger] = [ResumableCSVLogger(**place)]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(**place))
    return loggers


class SaveConfig(SaveConfigCallback):
    """Save the configuration once the run is known to be one, and without the checkpoint that it may go on from."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        super().__init__(parser, config, *args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save now where nothing is resumed."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when model and data have accepted the checkpoint."""
        super().setup(trainer, pl_module, "fit")
