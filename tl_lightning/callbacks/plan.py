"""The plan of a fit, printed before training."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from tl_lightning.callbacks.staged_unfreezing import StagedUnfreezing
from tl_lightning.data import CachedFeaturesDataModule, images_of
from tl_lightning.data.splits import TRAIN, describe_missing_classes
from tl_lightning.freezing import HEAD
from tl_lightning.modules import TransferClassifier
from tl_lightning.optim import stage_of_group
from tl_lightning.utils.console import print_table

_NAMES_SHOWN = 12
_LARGE_SHARE = 0.5
"""Share of the backbone above which "the last k stages" are probably more than was meant."""
_FEW_STAGES = 4
"""A network with fewer stages cannot be cut between its blocks; ResNets have five."""


class Plan(Callback):
    """Print a short plan when a fit starts: data, frozen and trained stages, learning rates, length and outputs.

    Example:
        Python: ``Trainer(callbacks=[Plan()])``.
        The command line always adds it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the plan."""
        folder = trainer.log_dir  # a collective operation
        if trainer.is_global_zero and isinstance(pl_module, TransferClassifier):
            outputs = {} if folder is None else {"outputs": str(folder)}
            print_table("plan", describe_plan(trainer, pl_module) | outputs)
            _warn_of_large_stages(trainer, pl_module)


def describe_plan(trainer: Trainer, classifier: TransferClassifier) -> dict[str, str]:
    """Return the rows of the plan: a name and a few words each."""
    backbone = classifier.backbone
    rows = {"model": f"{type(classifier).__name__} on {getattr(backbone, 'name', type(backbone).__name__)}"}
    if classifier.class_names is not None:
        names = list(classifier.class_names)
        more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        rows["classes"] = f"{len(names)}: {', '.join(names[:_NAMES_SHOWN])}{more}"
    data = getattr(trainer, "datamodule", None)
    images = images_of(data)
    if images is not None:
        rows["images"] = ", ".join(f"{len(samples.files):,} {split}" for split, samples in images.splits.items())
        missing = [
            describe_missing_classes(split, samples, images.class_names)
            for split, samples in images.splits.items()
            if split != TRAIN
        ]
        if any(missing):
            rows["not scored"] = "; ".join(text for text in missing if text)
    if isinstance(data, CachedFeaturesDataModule):
        rows["features"] = data.describe()
    rows |= _frozen_and_trained(trainer, classifier)
    if not classifier.automatic_optimization:
        rows["solved by"] = f"{type(classifier.head).__name__}, on all features at once"
    trained = {HEAD, *_stages_trained(trainer, classifier)}
    for optimizer in trainer.optimizers if classifier.automatic_optimization else ():
        rates = {stage_of_group(group): _peak_lr(group) for group in optimizer.param_groups}
        shown = ", ".join(f"{name} {lr:.3g}" for name, lr in rates.items() if name in trained)
        rows["learning rates"] = f"{type(optimizer).__name__}: {shown}"
    if classifier.automatic_optimization:
        rows["schedule"] = _schedule(trainer, classifier)
    rows["length"] = _length(trainer)
    processes = f"{trainer.world_size} processes on " if trainer.world_size > 1 else ""
    rows["device"] = f"{processes}{trainer.strategy.root_device.type}, precision {trainer.precision}"
    return rows


def _unfreezing(trainer: Trainer) -> StagedUnfreezing | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
    return next((callback for callback in callbacks if isinstance(callback, StagedUnfreezing)), None)


def _stages_trained(trainer: Trainer, classifier: TransferClassifier) -> set[str]:
    unfreezing = _unfreezing(trainer)
    if unfreezing is None:
        return set(classifier.freeze_policy.unfrozen)
    reached = (stage for epoch, stage in unfreezing.schedule.items() if _is_reached(trainer, epoch))
    return {name for stage in reached for name in classifier.stages_from(stage)}


def _is_reached(trainer: Trainer, epoch: int) -> bool:
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    if trainer.max_steps != -1 and math.isfinite(trainer.num_training_batches):
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        epochs = min(epochs, math.ceil(trainer.max_steps / steps_per_epoch))
    return epoch < epochs


def _peak_lr(group: dict[str, Any]) -> float:
    """Return the highest learning rate of a group over the run, as far as its scheduler tells."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _frozen_and_trained(trainer: Trainer, classifier: TransferClassifier) -> dict[str, str]:
    """Return the rows on frozen and trained stages, one for each epoch in which they change."""
    freeze_policy = classifier.freeze_policy
    names = list(freeze_policy.stages)
    head = sum(p.numel() for name, p in classifier.named_parameters() if not name.startswith("backbone."))

    def describe(chosen: Iterable[str], given: str | int) -> str:
        chosen = [name for name in names if name in set(chosen)]
        if not chosen:
            return f"head: {_count(head, 'parameter')}"
        share = "" if _last_stages(given, names) is None else f", {_share(classifier, chosen):.0%} of the backbone"
        return f"head: {_count(head, 'parameter')}; {_span(chosen, names)}: {_size(classifier, chosen)}{share}"

    rows = {}
    trained = _stages_trained(trainer, classifier)
    frozen = [name for name in names if name not in trained]
    if frozen:
        rows["frozen"] = f"{_span(frozen, names)}: {_size(classifier, frozen)} parameters, in eval mode"
        in_optimizer = {stage_of_group(group) for optimizer in trainer.optimizers for group in optimizer.param_groups}
        unused = [name for name in frozen if name in in_optimizer]
        if unused:
            never = "never does" if len(unused) == 1 else "never do"
            rows["frozen"] += f"; {_span(unused, names)} may train, but {never} in this run"
        if classifier.backbone.init_args[1].get("weights", "DEFAULT") is None:
            rows["frozen"] += ", with random weights: the backbone was built with weights=None"
    unfreezing = _unfreezing(trainer)
    if unfreezing is None:
        return rows | {"trained": describe(freeze_policy.unfrozen, freeze_policy.unfreeze_from)}
    schedule = {0: HEAD} | unfreezing.schedule
    for epoch, stage in schedule.items():
        note = "" if _is_reached(trainer, epoch) else " (never: the run is shorter)"
        rows[f"from epoch {epoch}"] = describe(classifier.stages_from(stage), stage) + note
    return rows


def _schedule(trainer: Trainer, classifier: TransferClassifier) -> str:
    if classifier.total_steps is not None:
        shape = f"warm-up, then a cosine to 0 over {_count(classifier.total_steps, 'step')}"
    else:
        shape = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs) or "none"
    unfreezing = _unfreezing(trainer)
    if unfreezing is None or not unfreezing.warmup_epochs:
        return shape
    epochs = "epoch" if unfreezing.warmup_epochs == 1 else "epochs"
    return f"{shape}; a stage warms up over its first {unfreezing.warmup_epochs:g} {epochs}"


def _length(trainer: Trainer) -> str:
    if trainer.max_epochs in (None, -1):
        return "until it is stopped" if math.isinf(trainer.estimated_stepping_batches) else _steps(trainer)
    start = f"from epoch {trainer.current_epoch} of " if trainer.current_epoch else ""
    return f"{start}{_count(trainer.max_epochs or 0, 'epoch')}, counted from 0, {_steps(trainer)}"


def _steps(trainer: Trainer) -> str:
    steps = trainer.estimated_stepping_batches
    return _count(int(steps), "step") if math.isfinite(steps) else "an unknown number of steps"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _span(chosen: Sequence[str], names: Sequence[str]) -> str:
    """Name stages in order, and consecutive ones as "first to last"."""
    parts: list[list[str]] = []
    for name in chosen:
        if parts and names.index(name) == names.index(parts[-1][-1]) + 1:
            parts[-1].append(name)
        else:
            parts.append([name])
    return ", ".join(part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def _size(classifier: TransferClassifier, names: Iterable[str]) -> str:
    return f"{_parameter_count(classifier, names):,}"


def _parameter_count(classifier: TransferClassifier, names: Iterable[str]) -> int:
    parameters = [name for stage in names for name in classifier.freeze_policy.stages[stage].parameters]
    return sum(classifier.backbone.get_parameter(name).numel() for name in parameters)


def _share(classifier: TransferClassifier, names: Iterable[str]) -> float:
    return _parameter_count(classifier, names) / _parameter_count(classifier, classifier.freeze_policy.stages)


def _last_stages(given: str | int, names: Sequence[str]) -> int | None:
    """Return k for a stage that is given as the last k stages, and None for a name."""
    return int(given) if str(given).isdecimal() and given not in names else None


def _warn_of_large_stages(trainer: Trainer, classifier: TransferClassifier) -> None:
    """Warn where the last k stages of a network that can hardly be cut hold most of its parameters."""
    names = list(classifier.freeze_policy.stages)
    if len(names) >= _FEW_STAGES:
        return
    unfreezing = _unfreezing(trainer)
    given = [classifier.freeze_policy.unfreeze_from] if unfreezing is None else unfreezing.schedule.values()
    for number in {_last_stages(stage, names) for stage in given} - {None, 0}:
        chosen = classifier.stages_from(number or 0)
        share = _share(classifier, chosen)
        if share > _LARGE_SHARE:
            one = len(chosen) == 1
            stages = f"last stage ({chosen[0]})" if one else f"last {number} stages ({_span(chosen, names)})"
            name = getattr(classifier.backbone, "name", "the backbone")
            rank_zero_warn(
                f"the {stages} of {name} {'holds' if one else 'hold'} {share:.0%} of its parameters, and all of them "
                "train. To train fewer, set unfreeze_from to the name of a module inside a stage"
            )
