"""Check the description of a classifier in a checkpoint field by field, so that damage is named."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tl_lightning.transforms import Preprocessing, eval_transform
from tl_lightning.utils.config_checks import check_config, wrong_value
from tl_lightning.utils.serialization import KIND

FORMAT = 1

TRAINING_ONLY = ("optimizer", "scheduler")
"""Arguments that only training needs: they may be any callable, and a checkpoint does not restore them."""

_FIELDS = ("format", "version", "model", "left_out", "class_names", "preprocessing", "hashes")
_LARGEST_SIDE = 1 << 14  # pixels; an image of a larger side would fill the memory
_LIGHTNING: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Fields that Lightning writes into checkpoints, and their types."""


def check_content(content: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Check all fields of a checkpoint that this library reads.

    Args:
        content: The content of the checkpoint.
        description: The description of the classifier in it, of this or an earlier format.

    Raises:
        ValueError: A field is missing, or its value is impossible; the message names it.
    """
    missing = [name for name in _FIELDS if name not in description]
    if missing or "state_dict" not in content:
        raise ValueError(f"it lacks {', '.join(missing) or 'its weights'}")
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise _wrong("state_dict", state, "it must map names to tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise _wrong(f"state_dict.{name}", tensor, "it must be a tensor")
    for name, kind in _LIGHTNING.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            raise _wrong(name, content[name], f"it must be a {kind.__name__}")
    if not isinstance(description["version"], str):
        raise _wrong("version", description["version"], "it must be a version of tl_lightning")
    _check_model(description["model"], description["class_names"], state)
    if not _is_list_of(str, description["left_out"]) or not set(description["left_out"]) <= set(TRAINING_ONLY):
        raise _wrong("left_out", description["left_out"], f"it must list names among {', '.join(TRAINING_ONLY)}")
    hashes = description["hashes"]
    if not isinstance(hashes, Mapping) or not all(isinstance(hashes.get(part), str) for part in ("backbone", "head")):
        raise _wrong("hashes", hashes, "it must give the hashes of backbone and head")
    to_preprocessing(description["preprocessing"])
    _check_place(description)


def check_training_state(content: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds the state of a training that can be resumed.

    Raises:
        ValueError: It does not, or a part is of another type; the message names it.
    """
    lacks = [name for name in ("optimizer_states", "lr_schedulers", "loops", "callbacks") if name not in content]
    if lacks:
        raise ValueError(f"it lacks {', '.join(lacks)}, the state of its training, so no run can resume from it")
    for name in ("optimizer_states", "lr_schedulers"):
        if not _is_list_of(dict, content[name]):
            raise _wrong(name, content[name], "it must list mappings")
    if not isinstance(content["loops"].get("fit_loop"), dict):
        raise _wrong("loops.fit_loop", content["loops"].get("fit_loop"), "it must map names to counts")


def check_format(description: Mapping[str, Any]) -> int:
    """Return the format of a description, which decides how to read the rest.

    Raises:
        ValueError: It is no number.
    """
    found = description.get("format", FORMAT)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise _wrong("format", found, "it must be a number, at least 1")
    return found


def to_preprocessing(fields: Any) -> Preprocessing:
    """Rebuild the preprocessing from its description.

    Raises:
        ValueError: It is no preprocessing that could be carried out.
    """
    names = Preprocessing._fields
    if not isinstance(fields, (list, tuple)) or len(fields) != len(names):
        raise _wrong("preprocessing", fields, f"it must list {', '.join(names)}")
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in fields]
    named = dict(zip(names, values, strict=True))
    for name in ("size", "crop"):
        value = named[name]
        if not all(_is_int(side) and 1 <= side <= _LARGEST_SIDE for side in _sides(value)):
            what = f"it must be a number of pixels from 1 to {_LARGEST_SIDE}, or a pair (height, width)"
            raise _wrong(f"preprocessing.{name}", value, what)
    for name in ("mean", "std"):
        value = named[name]
        if not (isinstance(value, tuple) and all(_is_number(channel) and abs(channel) < 1e6 for channel in value)):
            raise _wrong(f"preprocessing.{name}", value, "it must be three numbers, one for each channel")
    if not isinstance(named["interpolation"], str):
        raise _wrong("preprocessing.interpolation", named["interpolation"], "it must be a name")
    found = Preprocessing(*values)
    try:
        eval_transform(found)
    except ValueError as error:
        raise ValueError(f"preprocessing.{error}") from error
    return found


def _check_model(model: Any, class_names: Any, state: Mapping[str, Tensor]) -> None:
    check_config(model | {KIND: "object"} if isinstance(model, dict) else model, "model")
    check_config(model.get("backbone"), "model.backbone")
    if class_names is not None and not _is_list_of(str, class_names):
        raise _wrong("class_names", class_names, "it must list the names of the classes, or be None")
    number = model["init_args"].get("num_classes")
    if class_names is not None and _is_int(number) and number != len(class_names):
        raise ValueError(f"model.num_classes is {number}, but there are {len(class_names)} names for its classes")
    if _is_int(number) and number > sum(tensor.numel() for tensor in state.values()):
        raise _wrong("model.num_classes", number, "that is more than all numbers in the weights")


def _check_place(description: Mapping[str, Any]) -> None:
    """Check the place of the run, which only checkpoints with a state of training have."""
    steps, rates = description.get("total_steps"), description.get("used_lrs", {})
    if steps is not None and not (_is_int(steps) and steps >= 0):
        raise _wrong("total_steps", steps, "it must be a number of steps, or None")
    if not isinstance(rates, Mapping) or not all(_is_number(rate) for rate in rates.values()):
        raise _wrong("used_lrs", rates, "it must map stages to learning rates")
    losses = description.get("train_loss", [])
    if not _is_list_of(list, losses) or not all(len(each) == 2 and all(map(_is_number, each)) for each in losses):
        raise _wrong("train_loss", losses, "it must give a sum and a count for each process")


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(wrong_value(name, value, allowed))


def _sides(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) and len(value) == 2 else (value,)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
