"""Say before training what is going to happen."""

from collections.abc import Iterable, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from tl_lightning.callbacks.staged_unfreezing import StagedUnfreezing
from tl_lightning.callbacks.table import print_table
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import TransferClassifier

_NAMES_SHOWN = 12


class Plan(Callback):
    """Print a short plan when a fit starts: data, what is frozen, what is trained at which rates, where outputs go."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the plan."""
        folder = trainer.log_dir  # asks all ranks
        if trainer.is_global_zero and isinstance(pl_module, TransferClassifier):
            print_table("plan", describe_plan(trainer, pl_module) | {"outputs": str(folder)})


def describe_plan(trainer: Trainer, classifier: TransferClassifier) -> dict[str, str]:
    """Describe a fit that is about to start, a few words a row."""
    backbone = classifier.backbone
    rows = {"model": f"{type(classifier).__name__} on {getattr(backbone, 'name', type(backbone).__name__)}"}
    if classifier.class_names is not None:
        names = list(classifier.class_names)
        more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        rows["classes"] = f"{len(names)}: {', '.join(names[:_NAMES_SHOWN])}{more}"
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ImageFolderDataModule):
        rows["images"] = ", ".join(f"{len(samples.files):,} {split}" for split, samples in data.splits.items())
    rows |= _stages(trainer, classifier)
    for optimizer in trainer.optimizers:
        rates = {group["name"]: group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
        shown = ", ".join(f"{name} {lr:g}" for name, lr in rates.items() if not name.endswith("_no_decay"))
        rows["learning rates"] = f"{type(optimizer).__name__}: {shown}"
    steps = trainer.estimated_stepping_batches
    begun = f"from epoch {trainer.current_epoch} of " if trainer.current_epoch else ""
    rows["length"] = f"{begun}{_count(trainer.max_epochs or 0, 'epoch')}, {_count(int(steps), 'step')}"
    processes = f"{trainer.world_size} processes on " if trainer.world_size > 1 else ""
    rows["device"] = f"{processes}{trainer.strategy.root_device.type}, precision {trainer.precision}"
    return rows


def _stages(trainer: Trainer, classifier: TransferClassifier) -> dict[str, str]:
    """Say what is frozen and what is trained: in all epochs, or from which epoch on."""
    staging = classifier.staging
    head = sum(p.numel() for name, p in classifier.named_parameters() if not name.startswith("backbone."))

    def describe(names: Iterable[str]) -> str:
        chosen = [name for name in staging.stages if name in set(names)]
        if not chosen:
            return f"head: {head:,} parameters"
        return f"head: {head:,} parameters; {_span(chosen)}: {_size(classifier, chosen)}"

    staged = [c for c in trainer.callbacks if isinstance(c, StagedUnfreezing)]  # type: ignore[attr-defined]  # Lightning's own list
    frozen = [name for name in staging.stages if name not in (staging.trainable if staged else staging.trained)]
    rows = {}
    if frozen:
        rows["frozen"] = f"{_span(frozen)}: {_size(classifier, frozen)} parameters, in eval mode"
    if not staged:
        return rows | {"trained": describe(staging.trained)}
    schedule = {0: "head"} | staged[0].schedule
    for epoch, stage in schedule.items():
        late = " (never: the run is shorter)" if epoch >= (trainer.max_epochs or epoch + 1) > 0 else ""
        rows[f"from epoch {epoch}"] = describe(classifier.stages_from(stage)) + late
    return rows


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _size(classifier: TransferClassifier, names: Sequence[str]) -> str:
    parameters = [name for stage in names for name in classifier.staging.stages[stage].parameters]
    return f"{sum(classifier.backbone.get_parameter(name).numel() for name in parameters):,}"
