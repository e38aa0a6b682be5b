"""The progress bar."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich.progress import ProgressColumn, TextColumn, TimeRemainingColumn


class Progress(RichProgressBar):
    """Show Lightning's rich progress bar on one line of a terminal that is 80 characters wide.

    Example:
        Python: ``Trainer(callbacks=[Progress()])``.
        The command line adds it, unless ``--trainer.enable_progress_bar false``.

    The arguments are those of ``RichProgressBar``:
    https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.callbacks.RichProgressBar.html
    """

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return the columns before the metrics."""
        theme = self.theme
        return [
            TextColumn("[progress.description]{task.description}"),
            CustomBarColumn(10, complete_style=theme.progress_bar, finished_style=theme.progress_bar_finished),
            BatchesProcessedColumn(style=theme.batch_progress),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        ]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics under short names, without the version number of the run."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.replace("accuracy", "acc").replace("train_loss", "loss"): value for name, value in metrics.items()}
