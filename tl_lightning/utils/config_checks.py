"""Check the descriptions of classes and arguments in a checkpoint, so that damage is named by its place."""

import inspect
from collections import abc
from collections.abc import Collection, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from tl_lightning.utils.serialization import KIND, TRUSTED_PACKAGES, trusted_class

_KINDS = ("class", "partial", "object")
_SHOWN = 60  # characters of a value in a message


def check_config(config: Any, place: str) -> None:
    """Check that a description of a class, and those in its arguments, have the form that :func:`to_config` gives.

    Args:
        config: The description.
        place: Its place in the checkpoint, for messages.

    Raises:
        ValueError: A part is missing or of another type; the message names it.
    """
    if not isinstance(config, dict) or not isinstance(config.get("class_path"), str):
        found = config.get("class_path") if isinstance(config, dict) else config
        raise _wrong(f"{place}.class_path", found, "it must be the dotted path of a class")
    kind = config.get(KIND)
    if kind not in _KINDS:
        raise _wrong(f"{place}.{KIND}", kind, f"it must be one of {', '.join(_KINDS)}")
    named, positional = config.get("init_args", {} if kind == "class" else None), config.get("args", [])
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise _wrong(f"{place}.init_args", named, "it must map arguments to values")
    if not isinstance(positional, list):
        raise _wrong(f"{place}.args", positional, "it must list values")
    for name, value in (*named.items(), *enumerate(positional)):
        for part in _described(value):
            check_config(part, f"{place}.{name}")


def wrong_argument(config: dict[str, Any], place: str, given: Collection[str] = (), *, own_only: bool) -> str | None:
    """Find an argument in a description that its class does not take, lacks, or annotates with another type.

    Args:
        config: The description, which :func:`check_config` has checked.
        place: Its place in the checkpoint, for the message.
        given: Arguments that are given beside the described ones.
        own_only: Look only at classes of this package, whose annotations are known to be true.

    Returns:
        A message that names the argument; None if there is none.
    """
    cls = trusted_class(config["class_path"])
    named = config.get("init_args", {})
    for name, value in named.items():
        for part in _described(value):
            inner = wrong_argument(part, f"{place}.{name}", own_only=own_only)
            if inner is not None:
                return inner
    if (own_only and cls.__module__.partition(".")[0] != TRUSTED_PACKAGES[0]) or config.get(KIND) == "class":
        return None
    parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = get_type_hints(cls.__init__)
    for name, value in named.items():
        if name not in parameters:
            if not takes_any:
                return f"`{place}.{name}` is not an argument of {cls.__name__}"
        elif not (value == parameters[name].default or _fits(hints.get(name, Any), value)):
            expected = str(inspect.formatannotation(hints[name])).replace("typing.", "")
            return wrong_value(f"{place}.{name}", value, f"{cls.__name__} takes {expected}")
    if config.get(KIND) == "partial" or config.get("args"):
        return None
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and name not in named and name not in given:
            return f"`{place}.{name}` is missing; {cls.__name__} needs it"
    return None


def _described(value: Any) -> Iterator[dict[str, Any]]:
    """Find the descriptions of classes within a described value."""
    if isinstance(value, dict) and KIND in value:
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _described(item)


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a described value may have the type of an annotation; True where the annotation does not tell."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(one, value) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple, abc.Sequence):
        return isinstance(value, list) and all(_fits(inner[0], item) for item in value)
    if origin is abc.Callable or (isinstance(hint, type) and issubclass(hint, nn.Module)):
        return isinstance(value, dict)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, int) and value in (0, 1)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, str) if hint is str else True


def wrong_value(name: str, value: object, allowed: str) -> str:
    """Say that a field of a checkpoint has an impossible value."""
    text = repr(value)
    return f"`{name}` is {text if len(text) <= _SHOWN else f'{text[: _SHOWN - 3]}...'}; {allowed}"


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(wrong_value(name, value, allowed))
