"""Whether a classifier fits its data and its trainer."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from tl_lightning.batch import IdentifiesImages, NamesClasses, Preprocesses
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.distributed import all_gather_object
from tl_lightning.utils.messages import unknown


def check_preprocessing(data: object, wanted: Preprocessing) -> None:
    """Make sure that the data are prepared as the backbone wants.

    Raises:
        ValueError: They are prepared for another backbone.
    """
    if isinstance(data, Preprocesses) and data.preprocessing not in (None, wanted):
        raise ValueError(
            f"the data are prepared by {data.preprocessing}, and the backbone wants {wanted}; pass "
            "preprocessing=backbone.preprocessing to the data, after setting backbone.preprocessing if it shall be another"
        )


def class_names(data: object, num_classes: int, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names of the classes: those of the data, where these name any, else the classifier's.

    Raises:
        ValueError: The data have other classes than the classifier.
    """
    if not isinstance(data, NamesClasses):
        return names
    found = tuple(data.class_names)
    check_number(num_classes, found)
    if names is not None and names != found:
        raise ValueError(
            f"the model's classes are {', '.join(names)}, and the data's are {', '.join(found)}; both must be the same, in "
            "the same order"
        )
    return found


def check_number(num_classes: int, names: Sequence[str] | None) -> None:
    """Make sure that there are as many names as classes.

    Raises:
        ValueError: There are not.
    """
    if names is not None and len(names) != num_classes:
        raise ValueError(
            f"num_classes is {num_classes}, and there are {len(names)} classes in the data: {', '.join(names)}; leave "
            "num_classes out on the command line, and pass num_classes=data.num_classes in Python"
        )


def check_monitors(trainer: Trainer) -> None:
    """Make sure, once a validation has been tried, that it logs what callbacks go by.

    Raises:
        ValueError: It does not, and no code of the user's could do it later.
    """
    names = sorted(trainer.callback_metrics)
    going_by: list[tuple[object, str | None]] = [
        (callback, callback.monitor)
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
        if isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
    ]
    going_by += [(each.scheduler, each.monitor) for each in trainer.lr_scheduler_configs if each.reduce_on_plateau]
    own = type(trainer.lightning_module).__module__.partition(".")[0] != __name__.partition(".")[0]
    for what, monitor in going_by:
        if monitor is None or monitor in (*names, "train_loss"):
            continue
        text = f"{type(what).__name__} monitors an {unknown('score', monitor, names)}, and train_loss"
        if own and monitor.startswith("val"):  # a class of the user's may log others while it trains
            rank_zero_warn(f"{text}, in the validation that was tried before training")
        elif not own and (monitor.startswith("val") or f"val_{monitor}" in names):
            raise ValueError(text)


def check_checkpoint(trainer: Trainer) -> None:
    """Make sure that all ranks go on from the same checkpoint: each has looked for the last one by itself.

    Raises:
        ValueError: They do not.
    """
    found = all_gather_object(None if trainer.ckpt_path is None else str(trainer.ckpt_path))
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes go on from different checkpoints, {' and '.join(map(repr, dict.fromkeys(found)))}, since another run was "
            "begun at the same time: give the path of one"
        )


def adopt_data_state(data: object, checkpoint: dict[str, Any]) -> None:
    """Let a data module take up the state of another class, as that of stored features of the same images.

    Lightning gives it that of its own class alone, so that images would not be known as those that were trained on.

    Args:
        data: The data module at hand.
        checkpoint: As it was read; it is changed.
    """
    if not isinstance(data, IdentifiesImages):
        return
    for state in list(checkpoint.values()):
        if isinstance(state, dict) and state.keys() >= {"place", "images"}:
            checkpoint.setdefault(type(data).__qualname__, state)


def check_callbacks(trainer: Trainer) -> None:
    """Make sure that no callback of the trainer's undoes what the classifier does.

    Raises:
        ValueError: One does.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
                "GradientAccumulationScheduler changes how many batches make a step, which neither the schedule of the learning "
                "rates nor a resumed run can follow: give trainer.accumulate_grad_batches"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
                "StochasticWeightAveraging computes the statistics of all batch norm anew, that of frozen layers too: use "
                "tl_lightning.callbacks.EMA to average weights"
            )
        if (
            isinstance(callback, LearningRateFinder) and not callback._early_exit
        ):  # the tuner's own ends before training
            raise ValueError(
                "LearningRateFinder gives every group of the optimizer the same rate, and schedules do not follow it: call "
                "lightning.pytorch.tuner.Tuner(trainer).lr_find(model, datamodule=data) before fit, which sets model.lr"
            )
