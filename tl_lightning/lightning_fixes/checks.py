"""Checks of classifier, data and trainer that Lightning does not make.

Its own checks let a run start whose callbacks monitor unknown scores, change the accumulation, or recompute batch norm
statistics of frozen layers, and whose ranks resume from different checkpoints:
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/pytorch/trainer/configuration_validator.py.
Needed for Lightning 2.6. A function can be deleted when Lightning raises the error by itself.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from tl_lightning.batch import ImageSource
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.distributed import all_gather_object
from tl_lightning.utils.messages import unknown

_PACKAGE = __name__.partition(".")[0]


def check_preprocessing(data: object, expected: Preprocessing) -> None:
    """Check that the data module prepares images as the backbone expects.

    Raises:
        ValueError: The images are prepared for another backbone.
    """
    if isinstance(data, ImageSource) and data.preprocessing not in (None, expected):
        raise ValueError(
            f"the data module prepares images by {data.preprocessing}, but the backbone expects {expected}; pass "
            "preprocessing=backbone.preprocessing to the data module (to use another one, set backbone.preprocessing "
            "first)"
        )


def class_names(data: object, num_classes: int, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the class names of the data module, or those of the classifier where the data module has none.

    Raises:
        ValueError: The data module and the classifier have different classes.
    """
    if not isinstance(data, ImageSource) or data.class_names is None:
        return names
    found = tuple(data.class_names)
    check_number(num_classes, found)
    if names is not None and names != found:
        raise ValueError(
            f"the classes of the model are {', '.join(names)}, but those of the data are {', '.join(found)}; both "
            "must be the same, in the same order"
        )
    return found


def check_number(num_classes: int, names: Sequence[str] | None) -> None:
    """Check that there is one name for each class.

    Raises:
        ValueError: The numbers differ.
    """
    if names is not None and len(names) != num_classes:
        raise ValueError(
            f"num_classes is {num_classes}, but the data has {len(names)} classes: {', '.join(names)}; leave "
            "num_classes out on the command line, and pass num_classes=data.num_classes in Python"
        )


def check_monitors(trainer: Trainer) -> None:
    """Check, after the sanity validation, that validation logs the scores that callbacks monitor.

    A classifier of the user's own may log further scores while it trains, so that it only gets a warning.

    Raises:
        ValueError: A monitored score does not exist.
    """
    names = sorted(trainer.callback_metrics)
    monitors: list[tuple[object, str | None]] = [
        (callback, callback.monitor)
        for callback in callbacks_of(trainer)
        if isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
    ]
    monitors += [(each.scheduler, each.monitor) for each in trainer.lr_scheduler_configs if each.reduce_on_plateau]
    is_user_class = type(trainer.lightning_module).__module__.partition(".")[0] != _PACKAGE
    for owner, monitor in monitors:
        if monitor is None or monitor in (*names, "train_loss"):
            continue
        text = f"{type(owner).__name__} monitors an {unknown('score', monitor, names)}, and train_loss"
        if is_user_class and monitor.startswith("val"):
            rank_zero_warn(f"{text}, in the validation that was tried before training")
        elif not is_user_class and (monitor.startswith("val") or f"val_{monitor}" in names):
            raise ValueError(text)


def check_checkpoint(trainer: Trainer) -> None:
    """Check that all ranks resume from the same checkpoint, since each rank looks for it by itself.

    Raises:
        ValueError: The checkpoints differ.
    """
    found = all_gather_object(None if trainer.ckpt_path is None else str(trainer.ckpt_path))
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes resume from different checkpoints, {' and '.join(map(repr, dict.fromkeys(found)))}, "
            "because another run was started at the same time: give the path of one checkpoint"
        )


def load_data_state(data: object, checkpoint: dict[str, Any]) -> None:
    """Give the data module the state that a data module of another class has saved.

    Lightning restores the state of the same class only (trainer/connectors/checkpoint_connector.py,
    ``restore_datamodule``). A run on cached features and a run on the images themselves have the same place in the
    data.

    Args:
        data: The data module.
        checkpoint: The checkpoint.
    """
    if not isinstance(data, ImageSource) or not isinstance(data, LightningDataModule):
        return
    if type(data).__qualname__ in checkpoint:
        return
    for state in checkpoint.values():
        if isinstance(state, dict) and state.keys() >= {"place", "images"}:
            data.load_state_dict(state)


def check_callbacks(trainer: Trainer) -> None:
    """Check that no callback conflicts with the classifier.

    Raises:
        ValueError: A callback changes the accumulation or the batch size, averages frozen batch norm statistics, or
            sets one learning rate for all groups.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(  # noqa: TRY004 - the user's choice is wrong, not a type
                "GradientAccumulationScheduler changes how many batches make a step, so neither the learning rate "
                "schedule nor a resumed run can follow it: give trainer.accumulate_grad_batches"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(  # noqa: TRY004 - the user's choice is wrong, not a type
                "StochasticWeightAveraging recomputes the statistics of all batch norm layers, the frozen ones "
                "included: use tl_lightning.callbacks.EMA to average weights"
            )
        if isinstance(callback, BatchSizeFinder) and not callback._early_exit:  # the tuner's own ends before training
            raise ValueError(
                "BatchSizeFinder changes the batch size after the learning rate schedule has been built for another "
                "number of steps, so the run would train at wrong rates: call "
                "lightning.pytorch.tuner.Tuner(trainer).scale_batch_size(model, datamodule=data) before fit, which "
                "sets data.batch_size"
            )
        if isinstance(callback, LearningRateFinder):
            if callback._early_exit:
                callbacks_of(trainer).remove(callback)  # the tuner would leave it to the next fit
            raise ValueError(  # noqa: TRY004 - the user's choice is wrong, not a type
                "LearningRateFinder and Tuner.lr_find suggest rates far below those that train well (75 times below "
                "the default, measured on a linear probe), and give all groups of the optimizer the same rate: keep "
                "the default rate, or compare rates on held-out images by tl-lightning sweep, or by "
                "tl_lightning.cli.TransferTrainer.sweep in Python, and give the best one as model.lr"
            )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, an attribute that Lightning sets but does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # Lightning's own list
