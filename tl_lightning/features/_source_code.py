"""Hash the code that a network runs, so that rows of edited code are never read."""

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from types import CellType, CodeType

from torch import nn

from tl_lightning.backbones import Backbone

LIBRARIES = ("torch", "torchvision", "timm")
"""Packages whose code is identified by their version."""


def code_digest(backbone: Backbone) -> str:
    """Hash the classes of a backbone and of all its modules, and the functions hooked onto these modules.

    The hash covers source, bytecode, default arguments, closures, properties and plain class attributes. Classes of
    :data:`LIBRARIES` are left out. Not covered are functions that the classes call elsewhere, and attributes that are
    set on an instance after construction.

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
        for name, value in vars(cls).items():
            if not name.startswith("__") or inspect.isroutine(value):
                digest.update(f"{name} {_describe(value)}".encode())
    for module in modules:
        for function in _attached(module):
            digest.update(_describe(function).encode())
    return digest.hexdigest() + (f" (without the source of {', '.join(lacking)})" if lacking else "")


def _is_own(cls: type) -> bool:
    return cls not in Backbone.__mro__ and cls.__module__.partition(".")[0] not in LIBRARIES


def _attached(module: nn.Module) -> Iterator[object]:
    """Yield the functions of one module that its class does not define."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    if "forward" in vars(module):
        yield module.forward


def _describe(value: object, seen: frozenset[int] = frozenset()) -> str:
    """Describe a value by its content where that is code or plain data, otherwise by its type.

    Args:
        value: A class attribute, a hook, a default argument, or a closure's value.
        seen: Functions that are being described, since a function may lie in its own closure.
    """
    if isinstance(value, (type(None), bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_describe(item, seen) for item in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_describe(item, seen) for item in value))}}}"  # in no fixed order
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_describe(k, seen)}: {_describe(v, seen)}' for k, v in value.items())}}}"
    if isinstance(value, property):
        return f"property {_describe(value.fget, seen)} {_describe(value.fset, seen)}"
    if isinstance(value, functools.partial):
        return f"partial {_describe([value.func, value.args, value.keywords], seen)}"
    function = inspect.unwrap(value) if callable(value) else value
    function = getattr(function, "__func__", function)  # of a method, a class method or a static method
    code = getattr(function, "__code__", None)
    if code is None or id(function) in seen:
        return str(getattr(function, "__qualname__", type(function)))
    seen |= {id(function)}
    captured = [_cell_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    defaults = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    return f"{_instructions(code)} {_describe([*defaults, *captured], seen)}"


def _cell_content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _instructions(code: CodeType) -> str:
    constants = [
        _instructions(constant)
        if isinstance(constant, CodeType)
        else repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)  # in no fixed order
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
