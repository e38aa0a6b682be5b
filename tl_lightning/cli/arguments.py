"""The words of a command line: what the help says, and what the user says, before the parser sees it."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from tl_lightning.backbones import Backbone
from tl_lightning.cli.shipped_configs import resolve_config
from tl_lightning.modules import TransferClassifier
from tl_lightning.transforms import Preprocessing

DESCRIPTIONS = {
    "fit": "Train a classifier on a folder of images.",
    "validate": "Score a checkpoint on the validation images.",
    "test": "Score a checkpoint on the test images.",
    "predict": "Write predictions.csv for a folder of images, nested or flat.",
    "extract": "Compute and store the features that a fit on cached features trains on.",
    "sweep": "Compare heads, learning rates and weight decays on stored features, and keep the best.",
}
"""Of the subcommands."""

CACHING = ("extract", "sweep")
"""Subcommands that work on cached features."""

BUILDING = ("fit", *CACHING)
"""Subcommands whose model comes from the configuration, not from a checkpoint."""

HELP = {
    "ckpt_path": "Checkpoint: a file, or 'last' or 'best' for that of the newest run; a fit goes on from what it wrote last.",
    "weights_only": "Read checkpoints without executing anything in them.",
    "trainer.default_root_dir": "Folder of the runs, each of which gets a folder version_N in it.",
}
"""Instead of what Lightning's docstrings say."""

TITLES = {
    "An": "The network",
    "A": "The images",
    "Train": "The strategy",
    "Customize": "The trainer, which is Lightning's",
    **dict.fromkeys(("Runs", "Perform", "Run"), "The run"),
}
"""Instead of group titles that are the beginnings of docstrings, by their first word."""

_DEFAULT_MODEL = ("--backbone=TorchvisionBackbone", "--backbone.name=resnet50", "--model=LinearProbe")
_DEFAULT_DATA = "--data=ImageFolderDataModule"
_DEFAULT_CACHED_DATA = "--data=CachedFeaturesDataModule"

_CALLBACKS = "--trainer.callbacks"


def add_parts(parser: LightningArgumentParser, subcommand: str) -> None:
    """Add backbone, data and model to the parser of a subcommand, and link what follows from one for another."""
    if subcommand in BUILDING:
        network = "The pre-trained network; TorchvisionBackbone with the name resnet50 where none is named."
        parser.add_subclass_arguments(Backbone, "backbone", required=True, help=network)
    usual = "CachedFeaturesDataModule" if subcommand in CACHING else "ImageFolderDataModule"
    images = f"The images; {usual} where none is named."
    parser.add_subclass_arguments(LightningDataModule, "data", required=True, help=images)
    if subcommand in BUILDING:
        strategy = "How it is trained; LinearProbe where none is named."
        parser.add_subclass_arguments(TransferClassifier, "model", required=True, help=strategy)
        for key in ("model", "data"):
            parser.link_arguments("backbone", f"{key}.init_args.backbone", apply_on="instantiate")
        parser.link_arguments(
            "backbone", "data.init_args.preprocessing", compute_fn=preprocessing, apply_on="instantiate"
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")
    else:  # the configuration of a fit is valid here as well
        trust = "From the checkpoint. Name a class of your own here to let the checkpoint name it."
        for key in ("backbone", "model"):
            parser.add_argument(f"--{key}", type=str | dict | None, default=None, help=trust)


def preprocessing(backbone: Backbone) -> Preprocessing:
    """Return what the backbone wants images to go through; its name shows in the help."""
    return backbone.preprocessing


def complete(parser: LightningArgumentParser, subcommand: str) -> None:
    """Give the parser of a subcommand our words, and what Lightning's has not: defaults, and options of other subcommands.

    The configuration of a fit is valid for all of them.
    """
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    root = "data.images.root" if subcommand in CACHING else "data.root"
    parser.usage = f"tl-lightning {subcommand} [--config FILE] [--{root} FOLDER] [options]"
    for group in parser._action_groups:
        group.title = TITLES.get(str(group.title).partition(" ")[0], group.title)
    tested = "Test the best checkpoint when training has ended."
    unused: dict[str, Any] = {"type": Any, "default": None, "help": "Not used here."}
    parser.add_argument(
        "--test_after_fit", **({"type": bool, "default": False, "help": tested} if subcommand == "fit" else unused)
    )
    if subcommand in CACHING:
        for key in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{key}", **unused)
    else:
        parser.set_defaults(weights_only=True)
    if subcommand == "predict":
        parser.set_defaults(return_predictions=False)
    elif subcommand in ("validate", "test"):
        parser.set_defaults(verbose=False)


def class_paths(config: Any) -> Iterator[str]:
    """Find the classes that a configuration names, at any depth; a mere string is one."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, list):
        for item in config:
            yield from class_paths(item)
    elif isinstance(config, (dict, Namespace)):
        for key, value in vars(config).items() if isinstance(config, Namespace) else config.items():
            if key in ("class_path", "head") or isinstance(value, (dict, list, Namespace)):
                yield from class_paths(value)


def import_module_of(class_path: str) -> None:
    """Import the module of a class that the user has named.

    Raises:
        ValueError: There is no such module.
    """
    name = class_path.rpartition(".")[0]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and imports one that is not
        raise ValueError(
            f"{class_path!r} is named, and there is no module {error.name!r}: it is looked for in the current folder, "
            f"{Path.cwd()}, and among what is installed"
        ) from error


def name_classes(args: list[str]) -> list[str]:
    """Put configuration files first, which arguments then override, and default classes before arguments that name none.

    As defaults of the parser they would leave their own arguments behind in whatever class the user names.

    Raises:
        ValueError: A configuration is named that is neither a file nor shipped with the package.
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
            files.append(resolve_config(match[3] if match[2] else rest.pop(0)))
        else:
            others.append(arg)  # the parser will say what is missing
    others = _append_callbacks(others)
    configs = [_read(Path(file), subcommand) for file in files]
    named = {arg.partition("=")[0].removesuffix(".class_path") for arg in others}
    named |= {f"--{key}" for config in configs for key in config}
    data = _DEFAULT_CACHED_DATA if subcommand in CACHING else _DEFAULT_DATA
    defaults = [*(_DEFAULT_MODEL if subcommand in BUILDING else ()), data]
    added = [arg for arg in defaults if arg.partition("=")[0].partition(".")[0] not in named]
    forgotten = ["--backbone=null"] if subcommand in BUILDING and _is_replaced("backbone", configs, others) else []
    return [subcommand, *added, *(f"--config={file}" for file in files), *forgotten, *others]


def _is_replaced(key: str, configs: list[dict[str, Any]], args: list[str]) -> bool:
    """Return whether arguments name another class than the configuration.

    The parser would hand the new class those arguments of the old one that have the same names, as a network's ``name``.
    """
    configured = next((name for config in reversed(configs) for name in class_paths(config.get(key))), None)
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
    """Let a callback join those that are named before it, where the parser would put it in their place."""
    appended: list[str] = []
    named = False
    for arg, value in zip(args, [*args[1:], ""], strict=False):
        match = re.match(rf"{_CALLBACKS}(=(.*))?$", arg)
        is_class = match is not None and re.match(r"[A-Z]|\w+\.", match[2] if match[1] else value) is not None
        appended.append(arg.replace(_CALLBACKS, f"{_CALLBACKS}+", 1) if is_class and named else arg)
        named |= is_class
    return appended


def _read(file: Path, subcommand: str) -> dict[str, Any]:
    """Return what a configuration file has at its top; nothing if it cannot be read, which the parser will report."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(config, dict):
        return {}
    own = config.get(subcommand)
    return config | (own if isinstance(own, dict) else {})
