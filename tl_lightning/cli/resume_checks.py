"""Check that a checkpoint exists, that its classes are trusted, and that it fits the model that resumes from it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tl_lightning.modules import TransferClassifier
from tl_lightning.modules import checkpoint as checkpoints
from tl_lightning.utils.messages import unknown
from tl_lightning.utils.paths import short_path
from tl_lightning.utils.serialization import TRUSTED_PACKAGES

_MAY_DIFFER = {"weights", "scheduler_interval"}
_SHAPING = ("num_classes", "unfreeze_from")  # numbers that make another model
_SHOWN = 3

_Differences = dict[str, tuple[str, str]]  # the value in the checkpoint and the value now, by option


def check_exists(path: str | Path) -> None:
    """Check that a checkpoint file exists.

    Raises:
        FileNotFoundError: It does not; the message lists the checkpoints nearby.
    """
    path = Path(path)
    if path.is_file():
        return
    if path.is_dir():
        inside = [short_path(file) for file in sorted(path.rglob("*.ckpt"))]
        advice = f"give one of its checkpoints: {', '.join(inside)}" if inside else "it contains no checkpoint"
        raise FileNotFoundError(f"--ckpt_path is the folder {str(path)!r}; {advice}")
    folder = path.parent
    names = sorted(file.name for file in folder.glob("*.ckpt"))
    if names:
        nearby = unknown("checkpoint", path.name, names, of=short_path(folder.absolute())).partition("; ")[2]
    elif folder.is_dir():
        nearby = f"the folder {short_path(folder.absolute())!r} contains no checkpoint"
    else:
        nearby = f"the folder {str(folder)!r} does not exist"
    raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist; {nearby}")


def look_at(path: str | Path, *, resumes: bool) -> dict[str, Any]:
    """Read a checkpoint with its tensors mapped, to look at names, shapes and numbers.

    Args:
        path: The checkpoint file.
        resumes: Check the whole file, before a run is built that resumes from it; other commands load it next.

    Raises:
        ValueError: The file is damaged or no checkpoint; the message names the newest sound one beside it.
    """
    with checkpoints.name_sound_checkpoint(path, resumable=resumes):
        if resumes:
            checkpoints.check_checksums(Path(path))
        return checkpoints.read(path, mmap=True)


def check_trusted_classes(path: str | Path, saved: dict[str, Any]) -> None:
    """Check that the user has named the classes of a checkpoint that are of no trusted package; naming trusts them.

    Args:
        path: The checkpoint file.
        saved: The content of the checkpoint.

    Raises:
        ValueError: A class has not been named.
    """
    model = saved[checkpoints.KEY]["model"]
    trusted = (*TRUSTED_PACKAGES, "__main__")
    modules = {name: name.rpartition(".")[0] for name in _class_paths(model)}
    names = [name for name, at in modules.items() if at not in sys.modules and at.partition(".")[0] not in trusted]
    if not names:
        return
    parts = [*_model_and_backbone(model), *_head(model)]
    options = " ".join(f"--{key} {part['class_path']}" for key, part in parts if part["class_path"] in names)
    ways = [options] * bool(options) + [f"--config {config}" for config in _config_of_run(path)]
    raise ValueError(
        f"the checkpoint {str(path)!r} names the class {' and '.join(map(repr, names))}, which is neither of "
        f"{', '.join(TRUSTED_PACKAGES)} nor named on the command line. If you trust it, add "
        f"{' or '.join(ways) or 'the --config of its run'}"
    )


def check_max_epochs(path: str | Path, saved: dict[str, Any], max_epochs: int | None) -> None:
    """Check that a resumed run does not end before the epoch from which it resumes.

    Args:
        path: The checkpoint file.
        saved: The content of the checkpoint.
        max_epochs: The length of the resumed run; None and -1 do not limit it.

    Raises:
        ValueError: It would.
    """
    done = saved.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if max_epochs not in (None, -1) and done > int(max_epochs or 0):
        raise ValueError(
            f"the checkpoint {str(path)!r} has completed {done} epochs, but trainer.max_epochs is {max_epochs}: give "
            f"at least {done}"
        )


def check_same_model(path: str | Path, saved: dict[str, Any], classifier: TransferClassifier) -> None:
    """Check that a classifier has the classes, arguments and shapes of the one in a checkpoint.

    Learning rates and other mere numbers may differ.

    Args:
        path: The checkpoint file.
        saved: The content of the checkpoint; its tensors may be mapped.
        classifier: The classifier that is to be trained further.

    Raises:
        ValueError: The checkpoint has no training state, or its classifier has other classes, arguments or shapes.
    """
    if not saved.get("optimizer_states"):
        raise ValueError(
            f"the checkpoint {str(path)!r} holds a model without the state of its training, as the checkpoints of a "
            "sweep do, so a fit cannot resume from it: leave --ckpt_path out"
        )
    now = checkpoints.describe(classifier, {})  # without the weights, whose hashes would take seconds
    changed, rates = _differences(saved[checkpoints.KEY], now)
    shapes_then = {name: tuple(tensor.shape) for name, tensor in saved["state_dict"].items()}
    shapes_now = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    misfit = [name for name in shapes_then | shapes_now if shapes_then.get(name) != shapes_now.get(name)]
    if misfit and not changed:
        listed = ", ".join(misfit[:_SHOWN])
        changed = rates or {"weights": (listed, "other names or shapes, since the code of the classes has changed,")}
    if not changed:
        return
    given = "".join(f", or give --config {config}" for config in _config_of_run(path))
    lines = "".join(f"\n  {name}: {then} in the checkpoint, {now} now" for name, (then, now) in changed.items())
    raise ValueError(
        f"the checkpoint {str(path)!r} was trained with another model:{lines}\n"
        f"To resume, repeat the command of its run{given}. To train another model, leave --ckpt_path out"
    )


def _class_paths(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("class_path"), str):
            yield config["class_path"]
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from _class_paths(part)


def _model_and_backbone(model: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    return ("model", model), ("backbone", model["backbone"])


def _head(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    head = model["init_args"].get("head")
    return [("model.head", head)] if isinstance(head, dict) and "class_path" in head else []


def _config_of_run(path: str | Path) -> list[str]:
    """Return the configuration of the run that wrote a checkpoint, if the file still exists."""
    config = Path(path).resolve().parent.parent / "config.yaml"
    return [short_path(config)] if config.is_file() else []


def _differences(then: dict[str, Any], now: dict[str, Any]) -> tuple[_Differences, _Differences]:
    """Compare two descriptions of classifiers.

    Returns:
        The differences that make another model, and those of mere numbers, as learning rates.
    """
    changed: _Differences = {}
    rates: _Differences = {}
    for (key, before), (_, after) in zip(
        _model_and_backbone(then["model"]), _model_and_backbone(now["model"]), strict=True
    ):
        if before["class_path"] != after["class_path"]:
            changed[key] = (_typed(before | {"init_args": {}}), _typed(after | {"init_args": {}}))
            continue  # another class has other arguments
        first, second = _arguments(before), _arguments(after)
        for name in first.keys() & second.keys() - _MAY_DIFFER:  # an earlier version may have had fewer arguments
            pair = first[name], second[name]
            if _typed(pair[0]) != _typed(pair[1]):
                is_rate = key == "model" and name not in _SHAPING and all(_is_number(value) for value in pair)
                (rates if is_rate else changed)[f"{key}.{name}"] = (_typed(pair[0]), _typed(pair[1]))
    names = then["class_names"], now["class_names"]
    if None not in names and names[0] != names[1]:
        changed.pop("model.num_classes", None)
        changed["classes of the data"] = (_count_and_names(names[0]), _count_and_names(names[1]))
    return changed, rates


def _arguments(config: dict[str, Any]) -> dict[Any, Any]:
    return {**dict(enumerate(config.get("args", []))), **config.get("init_args", {})}


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _typed(value: Any) -> str:
    """Return a described value as a user would type it; of a class, its name and its arguments."""
    if isinstance(value, dict) and "class_path" in value:
        listed = ", ".join(f"{name}={_typed(argument)}" for name, argument in _arguments(value).items())
        return str(value["class_path"]).rpartition(".")[2] + (f"({listed})" if listed else "")
    return repr(list(value) if isinstance(value, tuple) else value)


def _count_and_names(class_names: list[str]) -> str:
    more = f" and {len(class_names) - _SHOWN} more" if len(class_names) > _SHOWN else ""
    return f"{len(class_names)} ({', '.join(class_names[:_SHOWN])}{more})"
