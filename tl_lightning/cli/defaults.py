"""Choose precision, loggers and callbacks for users who have not, and save the configuration of the run."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from tl_lightning.callbacks import Plan, PredictionWriter, Progress, Summary
from tl_lightning.lightning_fixes.metrics_log import ResumableCSVLogger
from tl_lightning.utils.files import write_atomically


def default_precision(accelerator: str) -> str:
    """Choose mixed precision on a CUDA device, with bfloat16 if it is native, and single precision elsewhere."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def default_loggers(folder: Path) -> list[Logger]:
    """Build a CSV logger, and one for TensorBoard if that is installed, which write to one folder."""
    place: dict[str, Any] = {"save_dir": folder.parent, "name": "", "version": folder.name}
    loggers: list[Logger] = [ResumableCSVLogger(**place)]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(**place))
    return loggers


def default_callbacks(
    subcommand: str, own: Sequence[Callback], *, progress: bool, writes: bool = True
) -> list[Callback]:
    """Build the callbacks that print the plan, the progress and the results.

    Args:
        subcommand: The subcommand; ``predict`` also writes predictions.
        own: The user's callbacks; a progress bar among them replaces the default one.
        progress: Whether to show a progress bar.
        writes: Whether the run writes files.
    """
    callbacks: list[Callback] = [Plan()]
    if progress and not any(isinstance(callback, ProgressBar) for callback in own):
        callbacks.append(Progress())
    if subcommand == "predict" and writes:  # it prints after the progress bar has ended, as the summary does
        callbacks.append(PredictionWriter())
    return [*callbacks, Summary()]


class SaveConfig(SaveConfigCallback):
    """Save the configuration after a fit has passed its checks, and without the checkpoint that it resumes from.

    Lightning empties the file of a resumed run before it writes, so that a full disk would leave nothing.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        super().__init__(parser, config, *args, **kwargs)
        self.save_to_log_dir = False  # save_config writes it
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration of all commands but fit."""
        if stage != "fit":
            self._save(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the configuration of a fit, now that model and data have accepted the checkpoint."""
        self._save(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, whole or not at all; Lightning calls this on the first rank.

        Raises:
            OSError: The file cannot be written, as on a full disk.
        """
        text = self.parser.dump(self.config, skip_none=False).encode(errors="surrogateescape")
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / self.config_filename, lambda file: file.write(text))

    def _save(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.already_saved:
            self._folder = Path(trainer.log_dir or ".")  # a collective operation
        super().setup(trainer, pl_module, stage)
