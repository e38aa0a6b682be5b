"""The words of a command line, before the parser sees them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

_DEFAULT_CLASSES = {
    "fit": ("--backbone=TorchvisionBackbone", "--backbone.name=resnet50", "--model=LinearProbe"),
    "any": ("--data=ImageFolderDataModule",),
}

_CALLBACKS = "--trainer.callbacks"


def class_paths(config: Any) -> Iterator[str]:
    """Find the classes that a configuration names, at any depth; a mere string is one."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, list):
        for item in config:
            yield from class_paths(item)
    elif isinstance(config, (dict, Namespace)):
        for key, value in vars(config).items() if isinstance(config, Namespace) else config.items():
            if key == "class_path" or isinstance(value, (dict, list, Namespace)):
                yield from class_paths(value)


def name_classes(args: list[str]) -> list[str]:
    """Put configuration files first, which arguments then override, and default classes before arguments that name none.

    As defaults of the parser they would leave their own arguments behind in whatever class the user names.
    """
    if not args or args[0].startswith("-"):
        return args
    subcommand, *rest = args
    files: list[str] = []
    others: list[str] = []
    while rest:
        arg = rest.pop(0)
        match = re.match(r"(-c|--config)(=(.*))?$", arg)
        if match is None:
            others.append(arg)
        elif match[2] or rest:
            files.append(match[3] if match[2] else rest.pop(0))
        else:
            others.append(arg)  # the parser will say what is missing
    others = _append_callbacks(others)
    named = {arg.partition("=")[0].removesuffix(".class_path") for arg in others}
    named |= {f"--{key}" for file in files for key in _keys_of(Path(file), subcommand)}
    defaults = [*_DEFAULT_CLASSES.get(subcommand, ()), *_DEFAULT_CLASSES["any"]]
    added = [arg for arg in defaults if arg.partition("=")[0].partition(".")[0] not in named]
    return [subcommand, *added, *(f"--config={file}" for file in files), *others]


def _append_callbacks(args: list[str]) -> list[str]:
    """Let a callback join those that are named before it, where the parser would put it in their place."""
    appended: list[str] = []
    named = False
    for arg, value in zip(args, [*args[1:], ""], strict=False):
        match = re.match(rf"{_CALLBACKS}(=(.*))?$", arg)
        is_class = match is not None and re.match(r"[A-Z]|\w+\.", match[2] if match[1] else value) is not None
        appended.append(arg.replace(_CALLBACKS, f"{_CALLBACKS}+", 1) if is_class and named else arg)
        named |= is_class
    return appended


def _keys_of(file: Path, subcommand: str) -> set[str]:
    """Return the top-level keys of a configuration file; none if it cannot be read, which the parser will report."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    if not isinstance(config, dict):
        return set()
    return set(config) | set(config.get(subcommand) or ())
