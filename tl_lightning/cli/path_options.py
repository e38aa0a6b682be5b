"""Expand the home folder and environment variables in the options that are paths."""

import os
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

_PATH_OPTION = re.compile(r"(?:.*_)?(?:root|dir|dirpath|path|folder|file|weights|cache)")
"""Names of options that are paths; an option whose type is a path may have any name."""
_NO_PATH_OPTION = "class_path"
_VARIABLE = re.compile(r"\$(?:\{(\w*)\}|([A-Za-z_]\w*))")


def expand_path(given: str, option: str) -> str:
    """Replace ``~`` and ``~user`` by the home folder, and ``$NAME`` and ``${NAME}`` by environment variables.

    Args:
        given: The path as the user has typed it.
        option: The option in messages.

    Raises:
        ValueError: A variable is not set, or there is no such user.
    """
    for match in _VARIABLE.finditer(given):
        name = match[1] or match[2]
        if not os.environ.get(name or ""):
            raise ValueError(
                f"--{option} is {given!r}, but the environment variable {name!r} is not set: set it, or give the path "
                "without it"
            )
    expanded = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], given))
    if given.startswith("~") and expanded.startswith("~"):
        user = Path(given).parts[0].removeprefix("~")
        raise ValueError(f"--{option} is {given!r}, but there is no user {user!r}: give the path of the folder")
    return expanded


def expand_path_options(config: Namespace, option: str = "") -> None:
    """Expand all options of a configuration that are paths, at any depth, in place.

    Args:
        config: The configuration of a subcommand, or a part of it.
        option: The option that the part belongs to; empty for the whole.

    Raises:
        ValueError: A variable is not set, or there is no such user.
    """
    for name, value in vars(config).items():
        inner = option if name == "init_args" else f"{option}.{name}".lstrip(".")
        vars(config)[name] = _expanded(value, name, inner)


def _expanded(value: Any, name: str, option: str) -> Any:
    if isinstance(value, Namespace):
        expand_path_options(value, option)
    elif isinstance(value, list):
        return [_expanded(item, name, option) for item in value]
    elif isinstance(value, dict):
        return {key: _expanded(item, str(key), f"{option}.{key}") for key, item in value.items()}
    elif isinstance(value, Path):
        return Path(expand_path(str(value), option))
    elif isinstance(value, str) and name != _NO_PATH_OPTION and _PATH_OPTION.fullmatch(name):
        return expand_path(value, option)
    return value
