"""The description of a classifier inside its checkpoint."""

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

_MOVED_MODULES = {
    "tl_lightning.heads.trained": "tl_lightning.heads.neural",
    "tl_lightning.heads.fitted": "tl_lightning.heads.closed_form",
}
"""New paths of modules whose classes older checkpoints name."""

TRAINING_ONLY = ("optimizer", "scheduler")
"""Arguments that only training needs: they may be any callable, and a checkpoint does not restore them."""


def check(classifier: TransferClassifier) -> None:
    """Check that a checkpoint could describe the classifier.

    Raises:
        ValueError: An argument of the classifier or of its backbone cannot be described.
    """
    _describe_arguments(classifier)


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
        "hashes": {part: fingerprint(tensors) for part, tensors in _parts(state).items()},
    }


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Divide the tensors into those of the backbone and all others, which count as the head."""
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, tensor in state.items():
        parts["backbone" if name.startswith("backbone.") else "head"][name] = tensor
    return parts


def read(path: str | Path, map_location: str | torch.device | None = None, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: The checkpoint file.
        map_location: Where to put the tensors; None puts them on the CPU.
        mmap: Map the tensors instead of reading them, to look at names, shapes and numbers. Do not read a mapped
            tensor's values while another process may write the file: Lightning replaces a file on another file system
            in place.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no checkpoint of this library, is damaged, or has a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist (looked in {path.resolve().parent})")
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the checkpoint {str(path)!r} cannot be read safely ({type(error).__name__}: {reason}); it is damaged, "
            "cut short, or no checkpoint"
        ) from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(KEY), dict)):
        raise ValueError(  # noqa: TRY004 - the content of the file is wrong, not a type
            f"{str(path)!r} is not a checkpoint of tl_lightning: it does not describe its model. To load the weights "
            "of a backbone, use the backbone's argument 'weights'"
        )
    missing = [key for key in _FIELDS if key not in checkpoint[KEY]]
    if missing or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"the checkpoint {str(path)!r} is damaged: it lacks {', '.join(missing) or 'its weights'}")
    if int(checkpoint[KEY]["format"]) > FORMAT:
        raise ValueError(
            f"{str(path)!r} was written by tl_lightning {checkpoint[KEY]['version']}, in a later format; update "
            "tl_lightning"
        )
    checkpoint[KEY]["model"] = _with_moved_classes(checkpoint[KEY]["model"])
    found: dict[str, Any] = checkpoint
    return found


def _with_moved_classes(config: Any) -> Any:
    """Replace the old paths of classes that have moved."""
    if isinstance(config, list):
        return [_with_moved_classes(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _with_moved_classes(item) for key, item in config.items()}
    module, _, name = str(config.get("class_path", "")).rpartition(".")
    if module in _MOVED_MODULES:
        config["class_path"] = f"{_MOVED_MODULES[module]}.{name}"
    return config


def load(cls: type[_C], path: str | Path, map_location: str | torch.device | None) -> _C:
    """Rebuild the classifier of a checkpoint; see :meth:`TransferClassifier.load_from_checkpoint`."""
    checkpoint = read(path, map_location)
    description = checkpoint[KEY]
    state = checkpoint["state_dict"]
    for part, tensors in _parts(state).items():
        if fingerprint(tensors) != description["hashes"].get(part):
            raise ValueError(f"the weights of the {part} in {str(path)!r} are not the saved ones: the file is damaged")
    saved = serialization.trusted_class(description["model"]["class_path"])
    if not issubclass(saved, cls):
        raise ValueError(  # noqa: TRY004 - the content of the file is wrong, not a type
            f"{str(path)!r} holds a {description['model']['class_path']}, which is no {cls.__name__}; load it with "
            f"{saved.__name__}.load_from_checkpoint, or with TransferClassifier.load_from_checkpoint, which loads any"
        )
    try:
        classifier: _C = _rebuild(saved, description)
        missing, unexpected = classifier.load_state_dict(state, strict=False)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the description of {saved.__name__} in {str(path)!r} does not fit its code or its weights "
            f"({type(error).__name__}: {error}); the file is damaged, or the code has changed since"
        ) from error
    if missing or unexpected:
        raise ValueError(
            f"the weights in {str(path)!r} do not fit {saved.__name__}: missing {missing[:5]}, unknown "
            f"{unexpected[:5]}. Has its code changed since, or was a part of it replaced after construction?"
        )
    if map_location is not None:
        classifier = classifier.to(map_location)
    return classifier.eval()


def _rebuild(saved: Any, description: dict[str, Any]) -> Any:
    """Build the classifier that a checkpoint describes, without its weights."""
    config = description["model"]
    backbone = serialization.from_config(serialization.without_weights(config["backbone"]))
    fields: list[Any] = [tuple(v) if isinstance(v, list) else v for v in description["preprocessing"]]
    backbone.preprocessing = Preprocessing(*fields)
    args, kwargs = serialization.from_config(config["args"]), serialization.from_config(config["init_args"])
    if args:  # a signature with *args: the backbone comes first
        args = [backbone, *args]
    else:
        kwargs["backbone"] = backbone
    classifier = saved(*args, **kwargs)
    names = description["class_names"]
    if names is not None and len(names) != classifier.num_classes:
        raise TypeError(f"{len(names)} names for {classifier.num_classes} classes")
    classifier.class_names = None if names is None else tuple(names)
    classifier.left_out = tuple(description["left_out"])
    return classifier
