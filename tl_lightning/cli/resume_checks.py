"""Whether there is a checkpoint, and whether a run goes on with the model that it holds."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tl_lightning.modules import TransferClassifier
from tl_lightning.modules import checkpoint as checkpoints
from tl_lightning.utils.messages import unknown
from tl_lightning.utils.paths import short_path
from tl_lightning.utils.serialization import TRUSTED_PACKAGES

_MAY_CHANGE = {"weights", "scheduler_interval"}
_SHAPING = ("num_classes", "unfreeze_from")
_SHOWN = 3


def check_there(path: str | Path) -> None:
    """Make sure that a checkpoint is there.

    Raises:
        FileNotFoundError: It is not; the message says which ones there are.
    """
    path = Path(path)
    if path.is_file():
        return
    if path.is_dir():
        found = [short_path(file) for file in sorted(path.rglob("*.ckpt"))]
        ones = f"give one of its checkpoints: {', '.join(found)}" if found else "and there is no checkpoint in it"
        raise FileNotFoundError(f"--ckpt_path is {str(path)!r}, a folder; {ones}")
    folder = path.parent
    names = sorted(file.name for file in folder.glob("*.ckpt"))
    if names:
        there = unknown("checkpoint", path.name, names, of=short_path(folder.absolute())).partition("; ")[2]
    elif folder.is_dir():
        there = f"there is none in {short_path(folder.absolute())!r}"
    else:
        there = f"there is no folder {str(folder)!r}"
    raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist; {there}")


def check_known(path: str | Path, saved: dict[str, Any]) -> None:
    """Make sure that classes of the user's own in a checkpoint have been named on the command line, which trusts them.

    Raises:
        ValueError: One has not.
    """
    model = saved[checkpoints.KEY]["model"]
    known = (*TRUSTED_PACKAGES, "__main__")
    modules = {name: name.rpartition(".")[0] for name in _classes(model)}
    names = [name for name, at in modules.items() if at not in sys.modules and at.partition(".")[0] not in known]
    if not names:
        return
    parts = [*_parts(model), *_head_of(model)]
    options = " ".join(f"--{key} {part['class_path']}" for key, part in parts if part["class_path"] in names)
    ways = [options] * bool(options) + [f"--config {config}" for config in _config_of(path)]
    raise ValueError(
        f"the checkpoint {str(path)!r} names the class {' and '.join(map(repr, names))}, which is neither of "
        f"{', '.join(TRUSTED_PACKAGES)} nor named on the command line. If you trust it, add "
        f"{' or '.join(ways) or 'the --config of its run'}"
    )


def _classes(described: Any) -> Iterator[str]:
    if isinstance(described, dict):
        if isinstance(described.get("class_path"), str):
            yield described["class_path"]
        described = list(described.values())
    if isinstance(described, list):
        for part in described:
            yield from _classes(part)


def _parts(model: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    return ("model", model), ("backbone", model["backbone"])


def _head_of(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    head = model["init_args"].get("head")
    return [("model.head", head)] if isinstance(head, dict) and "class_path" in head else []


def _config_of(path: str | Path) -> list[str]:
    """Return the configuration of the run that wrote a checkpoint, if it is still there."""
    config = Path(path).resolve().parent.parent / "config.yaml"
    return [short_path(config)] if config.is_file() else []


def check_length(path: str | Path, saved: dict[str, Any], max_epochs: int | None) -> None:
    """Make sure that a run is not to end before the epoch that it goes on from.

    Raises:
        ValueError: It is.
    """
    done = saved.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if max_epochs not in (None, -1) and done > int(max_epochs or 0):
        raise ValueError(
            f"the checkpoint {str(path)!r} has {done} epochs behind it, and trainer.max_epochs is {max_epochs}: give at least {done}"
        )


def check_resumed(path: str | Path, saved: dict[str, Any], classifier: TransferClassifier) -> None:
    """Make sure that a classifier is what a checkpoint was trained with; learning rates and the like may be others.

    Args:
        path: The checkpoint's file.
        saved: What :func:`tl_lightning.modules.checkpoint.read` has read from it.
        classifier: What is to be trained further.

    Raises:
        ValueError: It holds no run that could go on; or class, backbone, head, classes or stages are others.
    """
    if not saved.get("optimizer_states"):
        raise ValueError(
            f"the checkpoint {str(path)!r} holds a model and not the state of its training, as that of a sweep, so no run can go on "
            "from it: leave --ckpt_path out"
        )
    state = classifier.state_dict()
    was, now = (
        saved[checkpoints.KEY],
        checkpoints.describe(classifier, {}),
    )  # without weights, whose hashes take seconds
    changed, rates = _differences(was, now)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved["state_dict"].items()}
    now_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    misfit = [name for name in shapes | now_shapes if shapes.get(name) != now_shapes.get(name)]
    if misfit and not changed:
        changed = rates or {"weights": (", ".join(misfit[:_SHOWN]), "other ones, by the code of the classes")}
    if not changed:
        return
    given = "".join(f", or give --config {config}" for config in _config_of(path))
    lines = "".join(f"\n  {name}: {before} in the checkpoint, {after} now" for name, (before, after) in changed.items())
    raise ValueError(
        f"the checkpoint {str(path)!r} was trained with another model:{lines}\nTo resume, repeat the command of its run{given}. To train "
        "another model, leave --ckpt_path out"
    )


_Changes = dict[str, tuple[str, str]]  # what was and what is, by option


def _differences(was: dict[str, Any], now: dict[str, Any]) -> tuple[_Changes, _Changes]:
    """Return what differs in what was described: what makes another model, and mere numbers, as learning rates."""
    changed: _Changes = {}
    rates: _Changes = {}
    for (key, before), (_, after) in zip(_parts(was["model"]), _parts(now["model"]), strict=True):
        if before["class_path"] != after["class_path"]:
            changed[key] = (_shown(before | {"init_args": {}}), _shown(after | {"init_args": {}}))
            continue  # another class has other arguments
        first, second = _arguments(before), _arguments(after)
        for name in first.keys() & second.keys() - _MAY_CHANGE:  # an earlier version may have had fewer
            pair = first[name], second[name]
            if _shown(pair[0]) != _shown(pair[1]):
                is_rate = key == "model" and name not in _SHAPING and all(_is_number(value) for value in pair)
                (rates if is_rate else changed)[f"{key}.{name}"] = (_shown(pair[0]), _shown(pair[1]))
    names = was["class_names"], now["class_names"]
    if None not in names and names[0] != names[1]:
        changed.pop("model.num_classes", None)
        changed["classes of the data"] = (_listed(names[0]), _listed(names[1]))
    return changed, rates


def _arguments(described: dict[str, Any]) -> dict[Any, Any]:
    return {**dict(enumerate(described.get("args", []))), **described.get("init_args", {})}


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _shown(value: Any) -> str:
    """Return a described value as it would be typed: of a class or a factory, the name and the arguments."""
    if isinstance(value, dict) and "class_path" in value:
        listed = ", ".join(f"{name}={_shown(one)}" for name, one in _arguments(value).items())
        return str(value["class_path"]).rpartition(".")[2] + (f"({listed})" if listed else "")
    return repr(list(value) if isinstance(value, tuple) else value)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"
