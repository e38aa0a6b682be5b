"""Explain a mistake in a command line or a configuration: what was given, what is allowed, what to do next."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tl_lightning.cli.class_options import (
    CLASS_OPTIONS,
    LISTABLE_OPTIONS,
    closest,
    option_of,
    parameters,
    subclasses,
    typed_name,
)
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule
from tl_lightning.utils.messages import unknown

_PLACEHOLDERS = {"unfreeze_from": "STAGE", "root": "FOLDER", "schedule": "'{3: layer4}'", "head": "CLASS"}
_SHORTCUTS = {"images": "images.root"}  # a required class, and the option that suffices because it has a default
_FORMS = {
    "trainer.callbacks.schedule": "{epoch: stage}, as {3: layer4}, with which layer4 trains from epoch 3 on",
    "lr": "a list, as '[0.001, 0.01]'",
    "weight_decay": "a list, as '[0.0, 1.0]'",
    "boundaries": "a list of stages, as '[layer3, head]'",
    "heads": "a list of classes, as '[{class_path: LinearHead}, {class_path: MLPHead, init_args: {hidden: [256]}}]'",
}
"""The forms of values, by the full names of their options."""


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
    place = option_of(cls)
    if cls is None or place is None:
        return _explain_value(message, "", {}, options, command), "--help"
    text = _explain_class(cls, place, message, given, options)
    text = text or _explain_value(message, f"{place}.", given, options, command)
    return text, "--help" if cls in CLASS_OPTIONS.values() else f"--{place}.help {typed_name(cls)}"


def _explain_class(cls: type, place: str, message: str, given: dict[str, Any], options: set[str]) -> str | None:
    """Explain a missing or an unknown option of a class; return None for any other mistake.

    Args:
        cls: The class.
        place: The option that takes the class, as ``model``.
        message: The parser's own message.
        given: The given options, by name.
        options: The options of the class.
    """
    required = re.match(r"the following arguments are required: ([\w.]+)", message)
    if required:
        name = _SHORTCUTS.get(required[1], required[1])
        placeholder = _PLACEHOLDERS.get(name.rpartition(".")[2], name.upper())
        return f"{cls.__name__} needs {name!r}: add --{place}.{name} {placeholder}"
    if not re.match(r"Option .* is not accepted|unrecognized arguments|Key must be a string", message):
        return None
    strange = next((name.partition(".")[0] for name in given if name.partition(".")[0] not in options), None)
    if strange is None:
        return None
    if "class_path" in given:
        wrong = ", ".join(repr(name) for name in given if name not in ("class_path", "init_args", "dict_kwargs"))
        return f"{wrong} stands beside class_path in the configuration: put it under init_args"
    if cls in CLASS_OPTIONS.values():
        text = (
            f"--{place}.{strange} is an option of a class, and no class is named: name it before, as in "
            f"--{place} CLASS --{place}.{strange} ..."
        )
        return text + (f"\nFor the learning rate, use --{place.partition('.')[0]}.lr" if strange == "lr" else "")
    return _explain_unknown_option(cls, place, strange, options)


def _explain_unknown_option(cls: type, place: str, name: str, options: set[str]) -> str:
    """Say that a class has no such option, and which option or which other class was probably meant."""
    text = _no_option(cls.__name__, name, options)
    if "did you mean" in text or place not in LISTABLE_OPTIONS:
        return text
    inner = closest(name, parameters(ImageFolderDataModule)) if cls is CachedFeaturesDataModule else None
    if inner:
        return f"{text}\nIts images have {inner!r}: use --{place}.images.{inner}"
    candidates = ((other.__name__, closest(name, parameters(other))) for other in subclasses(CLASS_OPTIONS[place]))
    other, meant = next(((other, meant) for other, meant in candidates if meant), ("", None))
    has = f"\n{other} has {meant!r}" if meant else ""
    if place == "trainer.callbacks":
        return (
            f"{text}{has}\nOptions on the command line go to the last callback of the list. Change the others in the "
            f"configuration, or name all callbacks again, each before its options: --{place} FIRST --{place} SECOND"
        )
    return f"{text}{has}: name the class with --{place} {other}" if has else text


def _explain_value(message: str, prefix: str, given: dict[str, Any], options: set[str], command: str) -> str:
    """Explain a mistake in any option; return the message as it is if it is of no known kind."""
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
        return f"a command is missing: give one of {missing[1].replace(',', ', ')}"
    untyped = re.search(r"Parameter '(\w+)' from '([\w.]+)\.__init__' does not specify a type", message)
    if untyped:
        return (
            f"{untyped[2]} does not annotate the type of its argument {untyped[1]!r}, so the command line cannot set "
            "it: annotate its arguments, as def __init__(self, in_features: int, num_classes: int)"
        )
    keyed = re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if keyed is None:
        return message
    key, reason = prefix + keyed[1], keyed[2]
    name = re.search(r"(?:Expected a dot import path string: |Problem with given class_path ')([\w.-]+)", reason)
    if name and key == "data.images":
        return f"--{key} is {name[1]}, which is not a class of images; to name a folder, use --{key}.root {name[1]}"
    if name and key in CLASS_OPTIONS:
        return _unknown_class(key, name[1], reason)
    value = re.search(r"Given value: (.*)", reason) or re.search(r"Got value: (.*)", reason)
    shown = f"--{key} is {value[1] if value else given.get(keyed[1], 'wrong')}"
    if key in _FORMS:
        return f"{shown}; it takes {_FORMS[key]}"
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
            f"--{key} {given} cannot be found{because}\nThe module was searched for in the current folder, "
            f"{Path.cwd()}, and among the installed packages"
        )
    names = sorted({cls.__name__ for cls in subclasses(CLASS_OPTIONS[key])}) if key in LISTABLE_OPTIONS else []
    text = unknown("class", given, names, of=f"--{key}") if names else f"unknown class {given!r} for --{key}"
    return f"{text}\nName a class of your own by its dotted path, as --{key} my_module.MyClass"


def _no_option(of: str, name: str, options: Iterable[str]) -> str:
    close = closest(name, options)
    return f"{of} has no option {name!r}" + (f"; did you mean {close!r}?" if close else "")
