"""Prepare the arguments of a command line before they are parsed."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from tl_lightning.cli.config_files import read_config
from tl_lightning.cli.options import MODEL_FROM_CONFIG, ON_CACHED_FEATURES, SUBCOMMANDS
from tl_lightning.cli.path_options import expand_path
from tl_lightning.cli.shipped_configs import resolve_config

_DEFAULT_MODEL = ("--backbone=TorchvisionBackbone", "--backbone.name=resnet50", "--model=LinearProbe")
_DEFAULT_DATA = "--data=ImageFolderDataModule"
_DEFAULT_CACHED_DATA = "--data=CachedFeaturesDataModule"

_CALLBACKS = "--trainer.callbacks"
_GROUPS = ("trainer",)


def prepare_arguments(args: list[str]) -> list[str]:
    """Add the default classes that the user has not replaced, and put the configuration files before other arguments.

    Arguments override configuration files, wherever they stand. The default classes are no defaults of the parser,
    because their arguments would remain when the user names another class.

    Raises:
        ValueError: An option stands before the command, or a configuration is named that is neither a file nor shipped
            with the package, or that cannot be read.
    """
    if not args or args[0] in ("-h", "--help", "--version"):
        return args
    if args[0].startswith("-"):
        command = next((arg for arg in args if arg in SUBCOMMANDS), "fit")
        options = " ".join(arg for arg in args if arg != command)
        raise ValueError(
            f"{args[0]!r} stands where the command belongs: write tl-lightning {command} {options}\n"
            f"The commands are {', '.join(SUBCOMMANDS)}"
        )
    subcommand, *rest = args
    files: list[str] = []
    others: list[str] = []
    while rest:
        arg = rest.pop(0)
        match = re.match(r"(-c|--config)(=(.*))?$", arg)
        if match is None:
            others.append(arg)
        elif match[2] or (rest and not rest[0].startswith("-")):
            files.append(resolve_config(expand_path(match[3] if match[2] else rest.pop(0), "config")))
        else:
            others.append(arg)  # the parser reports the missing value
    others = _append_callbacks(others)
    configs = [_of_subcommand(read_config(Path(file), _GROUPS), subcommand) for file in files]
    named = {arg.partition("=")[0].removesuffix(".class_path") for arg in others}
    named |= {f"--{key}" for config in configs for key in config}
    data = _DEFAULT_CACHED_DATA if subcommand in ON_CACHED_FEATURES else _DEFAULT_DATA
    defaults = [*(_DEFAULT_MODEL if subcommand in MODEL_FROM_CONFIG else ()), data]
    added = [arg for arg in defaults if arg.partition("=")[0].partition(".")[0] not in named]
    replaced = subcommand in MODEL_FROM_CONFIG and _names_other_class("backbone", configs, others)
    reset = ["--backbone=null"] if replaced else []
    return [subcommand, *added, *(f"--config={file}" for file in files), *reset, *others]


def iter_class_paths(config: Any) -> Iterator[str]:
    """Find the classes that a configuration names, at any depth; a plain string counts as one."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, list):
        for item in config:
            yield from iter_class_paths(item)
    elif isinstance(config, (dict, Namespace)):
        for key, value in vars(config).items() if isinstance(config, Namespace) else config.items():
            if key in ("class_path", "head") or isinstance(value, (dict, list, Namespace)):
                yield from iter_class_paths(value)


def import_modules_of_classes(*configs: Any) -> None:
    """Import the modules of the classes in configurations, which the user may name anywhere.

    Raises:
        ValueError: There is no such module.
    """
    for class_path in iter_class_paths(list(configs)):
        name = class_path.rpartition(".")[0]
        try:
            if name:
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but an import in it fails
            raise ValueError(
                f"the class {class_path!r} cannot be imported: there is no module {error.name!r}, neither in the "
                f"current folder, {Path.cwd()}, nor among the installed packages"
            ) from error


def _names_other_class(key: str, configs: list[dict[str, Any]], args: list[str]) -> bool:
    """Return whether the arguments name another class for an option than the configuration files do.

    The parser would pass arguments of the configured class, as the ``name`` of a network, on to the other class.
    """
    configured = next((name for config in reversed(configs) for name in iter_class_paths(config.get(key))), None)
    given = next(
        (
            (rest or value).strip()
            for arg, value in zip(args, [*args[1:], ""], strict=False)
            for option, _, rest in [arg.partition("=")]
            if option.removesuffix(".class_path") == f"--{key}"
        ),
        None,
    )
    if configured is None or given is None or re.fullmatch(r"[\w.]+", given) is None:
        return False
    return configured.rpartition(".")[2] != given.rpartition(".")[2]


def _append_callbacks(args: list[str]) -> list[str]:
    """Append each further callback to those named before it, which the parser would replace by it."""
    appended: list[str] = []
    has_callback = False
    for arg, value in zip(args, [*args[1:], ""], strict=False):
        match = re.match(rf"{_CALLBACKS}(=(.*))?$", arg)
        is_class = match is not None and re.match(r"[A-Z]|\w+\.", match[2] if match[1] else value) is not None
        appended.append(arg.replace(_CALLBACKS, f"{_CALLBACKS}+", 1) if is_class and has_callback else arg)
        has_callback |= is_class
    return appended


def _of_subcommand(config: dict[str, Any], subcommand: str) -> dict[str, Any]:
    own = config.get(subcommand)
    return config | (own if isinstance(own, dict) else {})
