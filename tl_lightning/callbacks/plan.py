"""Say before training what is going to happen, and after it what came out and where it lies."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from tl_lightning.data import ImageFolderDataModule
from tl_lightning.freezing import Stage
from tl_lightning.modules import TransferClassifier

_NAMES_SHOWN = 12


class Plan(Callback):
    """Print a short plan when a fit starts: data, what is frozen, what is trained at which rates, where outputs go."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the plan."""
        folder = trainer.log_dir  # asks all ranks
        if trainer.is_global_zero and isinstance(pl_module, TransferClassifier):
            _print("plan", describe_plan(trainer, pl_module) | {"outputs": str(folder)})


class Outcome(Callback):
    """Print the scores after a validation or test, and where the files of a fit lie."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where the files lie, and the best score."""
        folder = trainer.log_dir
        best = trainer.checkpoint_callback
        rows = {}
        score = getattr(best, "best_model_score", None)
        if score is not None:
            rows[f"best {getattr(best, 'monitor', '')}"] = f"{float(score):.4f}"
            rows["best model"] = str(getattr(best, "best_model_path", ""))
        _print("trained", rows | {"outputs": str(folder)})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores of a validation that is no part of a fit."""
        if trainer.state.fn == "validate":
            _print_scores(trainer, "validated", "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores of the test."""
        _print_scores(trainer, "tested", "test")


def _print_scores(trainer: Trainer, title: str, split: str) -> None:
    rows = {}
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ImageFolderDataModule):
        rows["images"] = f"{len(data.splits[split].files):,}"
    for name, value in trainer.callback_metrics.items():
        if name.startswith(f"{split}_"):
            kind = name.removeprefix(f"{split}_")
            rows[f"{_WORDS[split]} {_WORDS.get(kind, kind)}"] = f"{float(value):.4f}"
    _print(title, rows | {"outputs": str(trainer.log_dir)})


_WORDS = {"val": "validation", "test": "test", "f1": "macro F1"}


def describe_plan(trainer: Trainer, classifier: TransferClassifier) -> dict[str, str]:
    """Describe a fit that is about to start, a few words a row."""
    rows = {
        "model": f"{type(classifier).__name__} on {getattr(classifier.backbone, 'name', type(classifier.backbone).__name__)}"
    }
    if classifier.class_names is not None:
        names = list(classifier.class_names)
        more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        rows["classes"] = f"{len(names)}: {', '.join(names[:_NAMES_SHOWN])}{more}"
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ImageFolderDataModule):
        rows["images"] = ", ".join(f"{len(samples.files):,} {split}" for split, samples in data.splits.items())
    staging = classifier.staging
    frozen = [stage for name, stage in staging.stages.items() if name not in staging.trained]
    if frozen:
        rows["frozen"] = f"{_span([s.name for s in frozen])}: {_size(classifier, frozen)} parameters, in eval mode"
    trained = [stage for name, stage in staging.stages.items() if name in staging.trained]
    head = sum(p.numel() for name, p in classifier.named_parameters() if not name.startswith("backbone."))
    rows["trained"] = f"head: {head:,} parameters"
    if trained:
        rows["trained"] += f"; {_span([s.name for s in trained])}: {_size(classifier, trained)} parameters"
    for optimizer in trainer.optimizers:
        rates = {group.get("name", "?"): group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
        rows["learning rates"] = f"{type(optimizer).__name__}: " + ", ".join(f"{n} {lr:g}" for n, lr in rates.items())
    steps = trainer.estimated_stepping_batches
    rows["length"] = f"{trainer.max_epochs} epochs, {steps} steps"
    processes = f"{trainer.world_size} processes on " if trainer.world_size > 1 else ""
    rows["device"] = f"{processes}{trainer.strategy.root_device.type}, precision {trainer.precision}"
    return rows


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _size(classifier: TransferClassifier, stages: Sequence[Stage]) -> str:
    return f"{sum(classifier.backbone.get_parameter(name).numel() for stage in stages for name in stage.parameters):,}"


@rank_zero_only
def _print(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
