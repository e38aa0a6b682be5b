"""What a classifier is made of, inside its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tl_lightning import __version__
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils import serialization
from tl_lightning.utils.hashing import fingerprint

if TYPE_CHECKING:
    from tl_lightning.modules.base import TransferClassifier

    _C = TypeVar("_C", bound=TransferClassifier)

KEY = "tl_lightning"
FORMAT = 1

_FIELDS = ("format", "version", "model", "left_out", "class_names", "preprocessing", "hashes")

TRAINING_ONLY = ("optimizer", "scheduler")
"""Arguments that only training needs: anything callable is allowed, and a checkpoint does not bring them back."""


def check(classifier: TransferClassifier) -> None:
    """Make sure that a checkpoint could describe the classifier.

    Raises:
        ValueError: Some argument of it, or of its backbone, has no description.
    """
    _describe_object(classifier)


def _describe_object(classifier: TransferClassifier) -> dict[str, Any]:
    positional, named = classifier.init_args
    if not any(value is classifier.backbone for value in (*positional, *named.values())):
        raise ValueError(
            f"{type(classifier).__name__} could not be saved: its backbone is not the one that it was made with. It must take "
            "it as an argument and leave it as it is; to compile, use torch.compile(classifier)"
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
        classifier: What is saved.
        state: Its parameters and buffers as they are saved, which need not be those at hand: they may be averages.
    """
    return {
        "format": FORMAT,
        "version": __version__,
        "model": _describe_object(classifier),
        "left_out": [name for name in TRAINING_ONLY if getattr(classifier, name) is not None],
        "class_names": None if classifier.class_names is None else list(classifier.class_names),
        "preprocessing": list(classifier.backbone.preprocessing),
        "hashes": {part: fingerprint(tensors) for part, tensors in _parts_of(state).items()},
    }


def _parts_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the backbone, and those of the head and whatever else there is."""
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, tensor in state.items():
        parts["backbone" if name.startswith("backbone.") else "head"][name] = tensor
    return parts


def read(path: str | Path, map_location: str | torch.device | None = None) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or none of this library, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist (looked in {path.resolve().parent})")
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the checkpoint {str(path)!r} cannot be read safely ({type(error).__name__}: {reason}); it is damaged, cut short, "
            "or no checkpoint"
        ) from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(KEY), dict)):
        raise ValueError(  # noqa: TRY004 - what is wrong is the file's content, not the type of an argument
            f"{str(path)!r} is not a checkpoint of tl_lightning: it does not say what its model is made of. The weights of a "
            "backbone are loaded with the backbone's argument 'weights'"
        )
    missing = [key for key in _FIELDS if key not in checkpoint[KEY]]
    if missing or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"the checkpoint {str(path)!r} is damaged: it lacks {', '.join(missing) or 'its weights'}")
    if int(checkpoint[KEY]["format"]) > FORMAT:
        raise ValueError(
            f"{str(path)!r} was written by tl_lightning {checkpoint[KEY]['version']}, in a later format; update tl_lightning"
        )
    found: dict[str, Any] = checkpoint
    return found


def load(cls: type[_C], path: str | Path, map_location: str | torch.device | None) -> _C:
    """Make the classifier of a checkpoint; see :meth:`TransferClassifier.load_from_checkpoint`."""
    checkpoint = read(path, map_location)
    made_of = checkpoint[KEY]
    state = checkpoint["state_dict"]
    for part, tensors in _parts_of(state).items():
        if fingerprint(tensors) != made_of["hashes"].get(part):
            raise ValueError(f"the {part} in {str(path)!r} is not the one that was saved: the file is damaged")
    saved = serialization.known_class(made_of["model"]["class_path"])
    if not issubclass(saved, cls):
        raise ValueError(  # noqa: TRY004 - what is wrong is the file's content, not the type of an argument
            f"{str(path)!r} holds a {made_of['model']['class_path']}, which is no {cls.__name__}; load it with "
            f"{saved.__name__}.load_from_checkpoint, or TransferClassifier's, which loads any"
        )
    try:
        classifier: _C = _rebuild(saved, made_of)
        missing, unexpected = classifier.load_state_dict(state, strict=False)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"what {str(path)!r} says of its {saved.__name__} does not fit the code or its weights "
            f"({type(error).__name__}: {error}); the file is damaged, or the code has changed since"
        ) from error
    if missing or unexpected:
        raise ValueError(
            f"the weights in {str(path)!r} do not fit {saved.__name__}: missing {missing[:5]}, unknown {unexpected[:5]}. Has "
            "its code changed since, or was a part of it replaced after it was made?"
        )
    if map_location is not None:
        classifier = classifier.to(map_location)
    return classifier.eval()


def _rebuild(saved: Any, made_of: dict[str, Any]) -> Any:
    """Make the classifier that a checkpoint describes, without its weights."""
    described = made_of["model"]
    rebuilt = serialization.from_config(serialization.without_weights(described["backbone"]))
    fields: list[Any] = [tuple(v) if isinstance(v, list) else v for v in made_of["preprocessing"]]
    rebuilt.preprocessing = Preprocessing(*fields)
    args, kwargs = serialization.from_config(described["args"]), serialization.from_config(described["init_args"])
    if args:  # a signature with *args: the backbone comes first
        args = [rebuilt, *args]
    else:
        kwargs["backbone"] = rebuilt
    classifier = saved(*args, **kwargs)
    names = made_of["class_names"]
    if names is not None and len(names) != classifier.num_classes:
        raise TypeError(f"{len(names)} names for {classifier.num_classes} classes")
    classifier.class_names = None if names is None else tuple(names)
    classifier.left_out = tuple(made_of["left_out"])
    return classifier
