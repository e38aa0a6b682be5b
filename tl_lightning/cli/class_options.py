"""Know the options that take a class, and find the classes that fit an option."""

import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tl_lightning.backbones import Backbone
from tl_lightning.modules import TransferClassifier

CLASS_OPTIONS: dict[str, type] = {
    "model": TransferClassifier,
    "backbone": Backbone,
    "data": LightningDataModule,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "model.optimizer": Optimizer,
    "model.scheduler": LRScheduler,
    "model.head": nn.Module,
}
"""The options that take a class, and the base class; a head is any module, so it comes last."""

LISTABLE_OPTIONS = CLASS_OPTIONS.keys() - {"model.head"}
"""The options with so few classes that a message can list them."""


def option_of(cls: type | None) -> str | None:
    """Return the option that takes a class; None if there is none."""
    return next((option for option, base in CLASS_OPTIONS.items() if cls is not None and issubclass(cls, base)), None)


def subclasses(cls: Any) -> Iterator[type]:
    """Find the concrete subclasses that can be named without a path: the package above their module exports them."""
    for child in cls.__subclasses__():
        package = sys.modules.get(child.__module__.rpartition(".")[0])
        exported = getattr(package, child.__name__, None)
        if isinstance(exported, type) and exported is child and not inspect.isabstract(child):
            yield exported
        yield from subclasses(child)


def parameters(cls: type) -> list[str]:
    """Return the names of the constructor's parameters."""
    return [name for name in inspect.signature(cls).parameters if name != "self"]


def typed_name(cls: type) -> str:
    """Return a class as a user types it: its name if that suffices, and its dotted path otherwise."""
    known = any(cls in subclasses(base) for option, base in CLASS_OPTIONS.items() if option in LISTABLE_OPTIONS)
    return cls.__name__ if known else f"{cls.__module__}.{cls.__qualname__}"


def closest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that was probably meant: by its full name, its beginning, or its last part; None if none is."""
    names = sorted(options)
    for longer in sorted((option for option in names if name and option.startswith(name)), key=len):
        return longer
    last_parts = {option.rpartition(".")[2]: option for option in names}
    for close in difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        return close
    for close in difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1, cutoff=0.7):
        return last_parts[close]
    return None
