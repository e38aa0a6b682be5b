"""The description of a classifier inside its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tl_lightning import __version__
from tl_lightning.modules._checkpoint_file import check_checksums, newest_first
from tl_lightning.modules._checkpoint_reading import (
    KEY,
    check_finite,
    check_hashes,
    check_weights,
    name_sound_checkpoint,
    parts,
    read,
    read_for_trainer,
)
from tl_lightning.modules._description import FORMAT, TRAINING_ONLY, to_preprocessing
from tl_lightning.utils import serialization
from tl_lightning.utils.config_checks import wrong_argument
from tl_lightning.utils.hashing import fingerprint

if TYPE_CHECKING:
    from tl_lightning.modules.base import TransferClassifier

    _C = TypeVar("_C", bound=TransferClassifier)

__all__ = [
    "KEY",
    "check",
    "check_checksums",
    "check_weights",
    "describe",
    "load",
    "name_sound_checkpoint",
    "newest_first",
    "read",
    "read_for_trainer",
]


def check(classifier: TransferClassifier) -> None:
    """Check that a checkpoint could describe the classifier.

    Raises:
        ValueError: An argument of the classifier or of its backbone cannot be described, or the preprocessing of the
            backbone cannot be carried out.
    """
    _describe_arguments(classifier)
    to_preprocessing(list(classifier.backbone.preprocessing))


def _describe_arguments(classifier: TransferClassifier) -> dict[str, Any]:
    positional, named = classifier.init_args
    if not any(value is classifier.backbone for value in (*positional, *named.values())):
        raise ValueError(
            f"{type(classifier).__name__} could not be saved: its backbone is not the one that it was given. It must "
            "take the backbone as an argument and keep it as it is; to compile, use torch.compile(classifier)"
        )
    named = {key: value for key, value in named.items() if key not in (*TRAINING_ONLY, "backbone", "class_names")}
    positional = tuple(value for value in positional if value is not classifier.backbone)
    try:
        return {
            "class_path": serialization.class_path(type(classifier)),
            "args": serialization.to_config(positional),
            "init_args": serialization.to_config(named),
            "backbone": serialization.to_config(classifier.backbone),
        }
    except ValueError as error:
        raise ValueError(f"{type(classifier).__name__} could not be saved: {error}") from error


def describe(classifier: TransferClassifier, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe a classifier in primitives.

    Args:
        classifier: The classifier.
        state: Its parameters and buffers as they are saved; they may be averages of the live ones.
    """
    return {
        "format": FORMAT,
        "version": __version__,
        "model": _describe_arguments(classifier),
        "left_out": [name for name in TRAINING_ONLY if getattr(classifier, name) is not None],
        "class_names": None if classifier.class_names is None else list(classifier.class_names),
        "preprocessing": list(classifier.backbone.preprocessing),
        "hashes": {part: fingerprint(tensors) for part, tensors in parts(state).items()},
    }


def load(cls: type[_C], path: str | Path, map_location: str | torch.device | None) -> _C:
    """Rebuild the classifier of a checkpoint; see :meth:`TransferClassifier.load_from_checkpoint`."""
    with name_sound_checkpoint(path):
        checkpoint = read(path, map_location)
        check_hashes(path, checkpoint)
    description = checkpoint[KEY]
    saved = serialization.trusted_class(description["model"]["class_path"])
    if not issubclass(saved, cls):
        raise ValueError(  # noqa: TRY004 - the content of the file is wrong, not a type
            f"{str(path)!r} holds a {description['model']['class_path']}, which is no {cls.__name__}; load it with "
            f"{saved.__name__}.load_from_checkpoint, or with TransferClassifier.load_from_checkpoint, which loads any"
        )
    classifier: _C = _rebuild(path, saved, description)
    with name_sound_checkpoint(path):
        check_finite(path, checkpoint, classifier.state_dict())
    try:
        missing, unexpected = classifier.load_state_dict(checkpoint["state_dict"], strict=False)
    except RuntimeError as error:
        raise _misfit(path, saved, error) from error
    if missing or unexpected:
        raise ValueError(
            f"the weights in {str(path)!r} do not fit {saved.__name__}: missing {missing[:5]}, unknown "
            f"{unexpected[:5]}. Has its code changed since, or was a part of it replaced after construction?"
        )
    if map_location is not None:
        classifier = classifier.to(map_location)
    return classifier.eval()


def _rebuild(path: str | Path, saved: Any, description: dict[str, Any]) -> Any:
    """Build the classifier that a checkpoint describes, without its weights."""
    config = description["model"]
    _refuse_wrong_arguments(path, config, own_only=True)
    try:
        backbone = serialization.from_config(serialization.without_weights(config["backbone"]))
        backbone.preprocessing = to_preprocessing(description["preprocessing"])
        args, kwargs = serialization.from_config(config["args"]), serialization.from_config(config["init_args"])
        if args:  # a signature with *args: the backbone comes first
            args = [backbone, *args]
        else:
            kwargs["backbone"] = backbone
        classifier = saved(*args, **kwargs)
    except Exception as error:  # the code of any class, which may have changed since
        _refuse_wrong_arguments(path, config, own_only=False)
        raise _misfit(path, saved, error) from error
    names = description["class_names"]
    classifier.class_names = None if names is None else tuple(names)
    classifier.left_out = tuple(description["left_out"])
    return classifier


def _refuse_wrong_arguments(path: str | Path, config: dict[str, Any], *, own_only: bool) -> None:
    wrong = wrong_argument(config, "model", ("backbone", "class_names", *TRAINING_ONLY), own_only=own_only)
    wrong = wrong or wrong_argument(config["backbone"], "model.backbone", own_only=own_only)
    if wrong is not None:
        raise ValueError(
            f"the description in the checkpoint {str(path)!r} does not fit its code: {wrong}. The file is damaged or "
            "was edited, or the code has changed since"
        )


def _misfit(path: str | Path, saved: type, error: Exception) -> ValueError:
    reason = shorten(str(error), width=300, placeholder=" ...")
    return ValueError(
        f"the description of {saved.__name__} in {str(path)!r} does not fit its code or its weights "
        f"({type(error).__name__}: {reason}); the file is damaged, or the code has changed since"
    )
