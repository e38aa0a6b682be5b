"""Hash the code that a network runs, so that rows of edited code are never read."""

import hashlib
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

from tl_lightning.backbones import Backbone

LIBRARIES = ("torch", "torchvision", "timm")
"""Packages whose code is identified by their version."""


def code_digest(backbone: Backbone) -> str:
    """Hash the classes of a backbone and of all its modules, and the functions hooked onto these modules.

    Classes of :data:`LIBRARIES` are left out. Functions that the classes call elsewhere are not followed.

    Returns:
        The SHA-256; where the source of a class cannot be found, followed by the name of the class.
    """
    modules = list(backbone.modules())
    classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__ if _is_own(cls))
    digest = hashlib.sha256()
    lacking = []
    for cls in classes:
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # a class of a console, of exec, or of a compiled extension
            source = f"{cls.__module__}.{cls.__qualname__}"
            lacking.append(source)
        digest.update(source.encode())
        # The source is that of the file now; a process that imported the file before it was edited runs other bytecode.
        for value in vars(cls).values():
            if inspect.isroutine(value):
                digest.update(_bytecode(value).encode())
    for module in modules:
        for function in _attached(module):
            digest.update(_bytecode(function).encode())
    return digest.hexdigest() + (f" (without the source of {', '.join(lacking)})" if lacking else "")


def _is_own(cls: type) -> bool:
    return cls not in Backbone.__mro__ and cls.__module__.partition(".")[0] not in LIBRARIES


def _attached(module: nn.Module) -> Iterator[object]:
    """Yield the functions of one module that its class does not define."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    if "forward" in vars(module):
        yield module.forward


def _bytecode(function: object) -> str:
    """Return the instructions, names and constants of a function; its name where it is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)  # type: ignore[arg-type]  # of any object
    return _instructions(code) if code is not None else str(getattr(function, "__qualname__", type(function)))


def _instructions(code: CodeType) -> str:
    constants = [
        _instructions(constant)
        if isinstance(constant, CodeType)
        else repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)  # in no fixed order
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
