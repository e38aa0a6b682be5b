"""Writing of predictions to a table."""

import csv
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tl_lightning.batch import PADDING, Batch, ImageSource
from tl_lightning.modules import TransferClassifier
from tl_lightning.utils.console import print_table


class PredictionWriter(Callback):
    """Write ``predictions.csv``: one row for each image, with the predicted class and all probabilities.

    The columns are ``path``, ``class_name``, ``probability`` and one for each class. The rows have the order of the
    data module's ``predict_files``, on any number of ranks. The file gets its name when it is complete.

    Example:
        Python: ``Trainer(callbacks=[PredictionWriter()]).predict(model, data, return_predictions=False)``.
        Command line: ``predict`` always adds it.

    Raises:
        TypeError: At the start of a prediction: the model is no :class:`TransferClassifier`, or the data module does
            not name its files.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._file: IO[str] | None = None
        self._rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file.

        Raises:
            TypeError: The model is no :class:`TransferClassifier`, or the data module does not name its files.
        """
        folder = trainer.log_dir  # a collective operation
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning attaches it
        if not isinstance(pl_module, TransferClassifier) or not isinstance(data, ImageSource):
            raise TypeError(
                f"PredictionWriter got a {type(pl_module).__name__} and a {type(data).__name__}: use a "
                "TransferClassifier, and a data module that inherits from ImageSource and sets predict_files"
            )
        self._path = Path(folder or ".") / "predictions.csv"
        self._rows = 0
        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.with_suffix(".csv.part").open(
                "w", newline="", encoding="utf-8", errors="surrogateescape"
            )
            names = pl_module.class_names or [f"class {number}" for number in range(pl_module.num_classes)]
            csv.writer(self._file).writerow(["path", "class_name", "probability", *names])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch of all ranks."""
        # All ranks have equally many rows, and the rows of a global batch follow each other in the order of the files.
        probabilities = _all_rows(trainer, outputs)  # (ranks * N, K)
        indices = _all_rows(trainer, batch.index)  # (ranks * N,)
        if self._file is None:
            return
        files = trainer.datamodule.predict_files  # type: ignore[attr-defined]  # Lightning attaches it
        names: Any = pl_module.class_names or [f"class {number}" for number in range(probabilities.shape[1])]
        writer = csv.writer(self._file)
        for index, row in zip(indices.tolist(), probabilities.tolist(), strict=True):
            if index != PADDING:
                best = max(range(len(row)), key=row.__getitem__)
                writer.writerow([files[index], names[best], f"{row[best]:.6g}", *(f"{p:.6g}" for p in row)])
                self._rows += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file and rename it."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.with_suffix(".csv.part").replace(self._path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print where the file is, after the progress bar has gone."""
        if stage == "predict" and self._rows:
            print_table("predicted", {"images": f"{self._rows:,}", "predictions": str(self._path)})


def _all_rows(trainer: Trainer, rows: Tensor) -> Tensor:
    gathered = trainer.strategy.all_gather(rows)  # (ranks, N, ...), or (N, ...) on one
    return gathered.flatten(0, 1) if trainer.world_size > 1 else rows
