"""What is wrong with a command line or a configuration, in the words of its user."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tl_lightning.backbones import Backbone
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule
from tl_lightning.modules import TransferClassifier
from tl_lightning.utils.messages import unknown

_PLACES: dict[str, type] = {
    "model": TransferClassifier,
    "backbone": Backbone,
    "data": LightningDataModule,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "model.optimizer": Optimizer,
    "model.scheduler": LRScheduler,
    "model.head": nn.Module,
}
"""The options that take a class, and of which kind; a head is any module, so it comes last."""

_SPOKEN_FOR = _PLACES.keys() - {"model.head"}
"""Those whose classes are few enough to be named in a message."""

_PLACEHOLDERS = {"unfreeze_from": "STAGE", "root": "FOLDER", "schedule": "'{3: layer4}'", "head": "CLASS"}
_FOLDERS = {"images": "images.root"}  # what a class is needed for, and what is enough to type
_FORMS = {
    "trainer.callbacks.schedule": "{epoch: stage}, as {3: layer4}, with which layer4 trains from epoch 3 on",
    "lr": "a list, as '[0.001, 0.01]'",
    "weight_decay": "a list, as '[0.0, 1.0]'",
    "boundaries": "a list of stages, as '[layer3, head]'",
    "heads": "a list of classes, as '[{class_path: LinearHead}, {class_path: MLPHead, init_args: {hidden: [256]}}]'",
}
"""Of options, by their full names."""


def explain(message: str, cls: type | None, given: dict[str, Any], options: set[str], command: str) -> tuple[str, str]:
    """Explain a parsing error in the user's words.

    Args:
        message: The parser's own message.
        cls: The class whose options were parsed; None for the options of a subcommand.
        given: The given options, by name.
        options: All options that the parser knows.
        command: The command with its subcommand.

    Returns:
        The explanation, and the option that lists all options.
    """
    place = _place_of(cls)
    if cls is None or place is None:
        return _explain(message, "", {}, options, command), "--help"
    text = _of_class(cls, place, message, given, options) or _explain(message, f"{place}.", given, options, command)
    return text, "--help" if cls in _PLACES.values() else f"--{place}.help {_typed(cls)}"


def _of_class(cls: type, place: str, message: str, given: dict[str, Any], options: set[str]) -> str | None:
    """Explain a mistake in the options of a class; None if it is of no known kind."""
    required = re.match(r"the following arguments are required: ([\w.]+)", message)
    if required:
        name = _FOLDERS.get(required[1], required[1])
        return f"{cls.__name__} needs {name!r}: add --{place}.{name} {_PLACEHOLDERS.get(name.rpartition('.')[2], name.upper())}"
    if not re.match(r"Option .* is not accepted|unrecognized arguments|Key must be a string", message):
        return None
    strange = next((name.partition(".")[0] for name in given if name.partition(".")[0] not in options), None)
    if strange is None:
        return None
    if "class_path" in given:
        wrong = ", ".join(repr(name) for name in given if name not in ("class_path", "init_args", "dict_kwargs"))
        return f"{wrong} stands beside class_path in the configuration: put it under init_args"
    if cls in _PLACES.values():
        text = f"--{place}.{strange} has no class to go to: name the class before it, as in --{place} CLASS --{place}.{strange} ..."
        return text + (f"\nThe learning rate is --{place.partition('.')[0]}.lr" if strange == "lr" else "")
    text = _no_option(cls.__name__, strange, options)
    if "did you mean" in text or place not in _SPOKEN_FOR:
        return text
    inner = _close(strange, _parameters(ImageFolderDataModule)) if cls is CachedFeaturesDataModule else []
    if inner:
        return f"{text}\nThe images in it have {inner[0]!r}: --{place}.images.{inner[0]}"
    others = {other.__name__: _close(strange, _parameters(other)) for other in _subclasses(_PLACES[place])}
    other, names = next(((other, names) for other, names in others.items() if names), ("", []))
    has = f"\n{other} has {names[0]!r}" if names else ""
    if place == "trainer.callbacks":
        return (
            f"{text}{has}\nOptions on the command line go to the last callback of the list: change the others in the "
            f"configuration, or name all callbacks anew, each with its options after it: --{place} FIRST --{place} SECOND"
        )
    return f"{text}{has}: name the class with --{place} {other}" if has else text


def _explain(message: str, prefix: str, given: dict[str, Any], options: set[str], command: str) -> str:
    """Explain a mistake wherever it was made; what is of no known kind stays as it is."""
    found = re.match(r"unrecognized arguments: (?:--)?([\w.+-]+)", message) or re.search(
        r"does not accept option '([^']+)'", message
    )
    if found:
        group = re.match(r"Group '([^']+)'", message)
        return _no_option(command, f"{group[1]}.{found[1]}" if group else found[1], options)
    choice = re.match(r"argument subcommand: invalid choice: '(.*)' \(choose from (.*)\)", message)
    if choice:
        return unknown("command", choice[1], re.findall(r"\w+", choice[2]))
    missing = re.match(r'expected "subcommand" to be one of \{(.*)\}', message)
    if missing:
        return f"a command is missing: there are {missing[1].replace(',', ', ')}"
    untyped = re.search(r"Parameter '(\w+)' from '([\w.]+)\.__init__' does not specify a type", message)
    if untyped:
        return (
            f"{untyped[2]} says no type of its argument {untyped[1]!r}, so nothing can be given for it on a command line: annotate "
            "its arguments, as def __init__(self, in_features: int, num_classes: int)"
        )
    keyed = re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if keyed is None:
        return message
    key, reason = prefix + keyed[1], keyed[2]
    name = re.search(r"(?:Expected a dot import path string: |Problem with given class_path ')([\w.-]+)", reason)
    if name and key == "data.images":
        return f"--{key} is {name[1]}, which is no class of images; a folder is named by --{key}.root {name[1]}"
    if name and key in _PLACES:
        return _unknown_class(key, name[1], reason)
    value = re.search(r"Given value: (.*)", reason) or re.search(r"Got value: (.*)", reason)
    shown = f"--{key} is {value[1] if value else given.get(keyed[1], 'wrong')}"
    if key in _FORMS:
        return f"{shown}; it is {_FORMS[key]}"
    types = re.search(r"Subtypes: \[(.*)\]", reason) or re.search(r"Expected a (<class '[\w.]+'>)", reason)
    if value and types:
        allowed = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types[1]).replace("NoneType", "null")
        return f"{shown}; it takes {' or '.join(allowed.split(', '))}"
    return f"--{key}: {reason}"


def _unknown_class(key: str, given: str, reason: str) -> str:
    if "." in given:
        why = re.search(r"^ +(No module named .*|.*has no attribute.*|.*[Nn]ot.* subclass .*)$", reason, re.MULTILINE)
        because = f": {why[1].strip()}" if why else ""
        return (
            f"--{key} {given} cannot be found{because}\nIts module is looked for in the current folder, {Path.cwd()}, and "
            "among what is installed"
        )
    names = sorted({cls.__name__ for cls in _subclasses(_PLACES[key])}) if key in _SPOKEN_FOR else []
    text = unknown("class", given, names, of=f"--{key}") if names else f"unknown class {given!r} for --{key}"
    return f"{text}\nA class of your own is named by its dotted path, as --{key} my_module.MyClass"


def _no_option(of: str, name: str, options: Iterable[str]) -> str:
    close = _close(name, options)
    return f"{of} has no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _close(name: str, options: Iterable[str]) -> list[str]:
    """Return the option that was probably meant, by its name or by the end of it."""
    names = sorted(options)
    ends = {option.rpartition(".")[2]: option for option in names}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return close or [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.7)]


def _place_of(cls: type | None) -> str | None:
    return next((place for place, kind in _PLACES.items() if cls is not None and issubclass(cls, kind)), None)


def _subclasses(cls: Any) -> Iterator[type]:
    """Find the classes that can be named without a path: those that a package of their own offers."""
    for child in cls.__subclasses__():
        package = sys.modules.get(child.__module__.rpartition(".")[0])
        offered = getattr(package, child.__name__, None)
        if isinstance(offered, type) and offered is child and not inspect.isabstract(child):
            yield offered
        yield from _subclasses(child)


def _parameters(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "self"]


def _typed(cls: type) -> str:
    """Return a class as it would be typed: by its name where that is known, else by its dotted path."""
    known = any(cls in _subclasses(kind) for place, kind in _PLACES.items() if place in _SPOKEN_FOR)
    return cls.__name__ if known else f"{cls.__module__}.{cls.__qualname__}"
