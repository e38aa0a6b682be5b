"""Writing of predictions to a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tl_lightning.batch import PADDING, UNREADABLE, Batch, ImageSource
from tl_lightning.data import ResumableDataModule
from tl_lightning.images import ImageError, read_image, short_reason
from tl_lightning.modules import TransferClassifier
from tl_lightning.utils.console import print_table
from tl_lightning.utils.messages import listed
from tl_lightning.utils.spreadsheet import quote_formula

_COLUMNS = ("path", "class_name", "probability")


class PredictionWriter(Callback):
    """Write ``predictions.csv``: one row for each image, with the predicted class and all probabilities.

    The columns are ``path``, ``class_name``, ``probability`` and one for each class. The rows have the order of the
    data module's ``predict_files``, on any number of ranks. The file gets its name when it is complete; after an error,
    the rows that are done are in ``predictions.partial.csv``.

    Images that cannot be read are listed in ``unreadable.csv``, with the reason. The run goes on without them, and ends
    with an error that counts them.

    A class that is called like one of the first three columns has the column ``probability of`` and its name. Names
    and paths that a spreadsheet program would run as formulas begin with an apostrophe:
    :func:`tl_lightning.utils.spreadsheet.unquote_formula` removes it.

    Example:
        Python: ``Trainer(callbacks=[PredictionWriter()]).predict(model, data, return_predictions=False)``.
        Command line: ``predict`` always adds it.

    Raises:
        TypeError: At the start of a prediction: the model is no :class:`TransferClassifier`, or the data module does
            not name its files.
        ImageError: At the end of a prediction: some images could not be read.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._file: IO[str] | None = None
        self._rows = 0
        self._unreadable: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the data module mark images that cannot be read."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning attaches it
        if stage == "predict" and isinstance(data, ImageSource):
            data.mark_unreadable = True

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
        self._unreadable = set()
        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_table(self._path.with_suffix(".csv.part"))
            _write_row(self._file, [*_COLUMNS, *_class_columns(_names(pl_module))])

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
        places = _all_rows(trainer, torch.stack([batch.index, batch.target], 1)).tolist()  # (ranks * N, 2)
        self._unreadable |= {UNREADABLE - target for _, target in places if target <= UNREADABLE}
        if self._file is None:
            return
        files = trainer.datamodule.predict_files  # type: ignore[attr-defined]  # Lightning attaches it
        names = _names(pl_module)
        for (index, _), row in zip(places, probabilities.tolist(), strict=True):
            if index != PADDING:
                best = max(range(len(row)), key=row.__getitem__)
                _write_row(self._file, [files[index], names[best], f"{row[best]:.6g}", *(f"{p:.6g}" for p in row)])
                self._rows += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file and rename it, and list the images that could not be read."""
        if self._file is None:
            return
        self._close(self._path)
        if self._unreadable:
            data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning attaches it
            root = data.root if isinstance(data, ResumableDataModule) else Path()
            with _open_table(self._path.with_name("unreadable.csv")) as file:
                _write_row(file, ["path", "reason"])
                for name in self._unreadable_files(trainer):
                    _write_row(file, [name, _reason(root / name)])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the rows that are done, under another name."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning attaches it
        if isinstance(data, ImageSource):
            data.mark_unreadable = False
        if self._file is not None:
            self._close(self._path.with_name("predictions.partial.csv"))
            if self._rows:
                so_far = str(self._path.with_name("predictions.partial.csv"))
                print_table("predicted before the error", {"images": f"{self._rows:,}", "predictions": so_far})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print where the file is, after the progress bar has gone.

        Raises:
            ImageError: Some images could not be read.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning attaches it
        if stage != "predict" or not isinstance(data, ImageSource):
            return
        data.mark_unreadable = False
        rows = {"images": f"{self._rows:,}", "predictions": str(self._path)}
        if self._unreadable:
            rows["not read"] = f"{len(self._unreadable):,}, listed in {self._path.with_name('unreadable.csv')}"
        if self._rows or self._unreadable:
            print_table("predicted", rows)
        if self._unreadable:
            names = self._unreadable_files(trainer)
            raise ImageError(
                f"{len(names):,} of {len(data.predict_files):,} images cannot be read and have no row in "
                f"{str(self._path)!r}: {listed([repr(name) for name in names])}; unreadable.csv beside it lists all"
            )

    def _unreadable_files(self, trainer: Trainer) -> list[str]:
        files = trainer.datamodule.predict_files  # type: ignore[attr-defined]  # Lightning attaches it
        return [files[place] for place in sorted(self._unreadable)]

    def _close(self, path: Path) -> None:
        assert self._file is not None  # noqa: S101 - the callers have checked it
        self._file.close()
        self._file = None
        self._path.with_suffix(".csv.part").replace(path)


def _names(classifier: LightningModule) -> Sequence[str]:
    assert isinstance(classifier, TransferClassifier)  # noqa: S101 - checked when the prediction started
    return classifier.class_names or [f"class {number}" for number in range(classifier.num_classes)]


def _class_columns(names: Sequence[str]) -> list[str]:
    """Return the name of the column of each class, different from those of the first columns."""
    taken, columns = {*_COLUMNS, *names}, []
    for name in names:
        column = name
        while name in _COLUMNS and column in taken:
            column = f"probability of {column}"
        taken.add(column)
        columns.append(column)
    return columns


def _open_table(path: Path) -> IO[str]:
    return path.open("w", newline="", encoding="utf-8", errors="surrogateescape")


def _write_row(file: IO[str], cells: Sequence[str]) -> None:
    csv.writer(file).writerow([quote_formula(cell) for cell in cells])


def _reason(path: Path) -> str:
    """Return why an image cannot be read."""
    try:
        read_image(path)
    except ImageError as error:
        return short_reason(error, path)
    return "it could not be read at first, but can be now; run predict again"


def _all_rows(trainer: Trainer, rows: Tensor) -> Tensor:
    gathered = trainer.strategy.all_gather(rows)  # (ranks, N, ...), or (N, ...) on one
    return gathered.flatten(0, 1) if trainer.world_size > 1 else rows
