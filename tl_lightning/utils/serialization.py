"""Describe objects by primitives, which a checkpoint can hold, and rebuild the objects from them.

A checkpoint comes from elsewhere, so nothing in it is executed or unpickled. It may name only classes of a few
libraries, or of modules that the program itself has imported.
"""

import functools
import importlib
import inspect
import sys
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

TRUSTED_PACKAGES = ("tl_lightning", "torch", "torchvision", "timm")

KIND = "__made_of__"
"""The key of a description that tells whether it is of a class, a partial or an object."""

_PRIMITIVES = (type(None), bool, int, float, str)


class InitArgsMixin:
    """Record the constructor's arguments under the names that the object's own class gives them."""

    init_args: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the object and record the arguments."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:
            return self  # a copy, which restores its own state; or wrong arguments, which __init__ reports next
        bound.apply_defaults()
        named: dict[str, Any] = {}
        extra: tuple[Any, ...] = ()
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL:
                extra = bound.arguments.get(name, ())
            elif parameter.kind is parameter.VAR_KEYWORD:
                named.update(bound.arguments.get(name, {}))
            else:
                named[name] = bound.arguments[name]
        if extra:  # with *args in the signature, the arguments before it can only be given by position
            before = [
                n for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            extra = (*(named.pop(name) for name in before[1:]), *extra)
        object.__setattr__(self, "init_args", (extra, named))
        return self


def class_path(cls: type) -> str:
    """Return the dotted path by which a class is imported.

    Raises:
        ValueError: The class is local to a function, so that it could not be imported when a checkpoint is loaded.
    """
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__} cannot be imported by its name, so it could not be loaded from a "
            "checkpoint; define it at the top level of a module"
        )
    return f"{cls.__module__}.{cls.__qualname__}"


def to_config(value: Any) -> Any:
    """Turn a value into primitives from which :func:`from_config` rebuilds an equal value.

    Args:
        value: A primitive, a tensor, an importable class, a ``functools.partial`` of one, an object whose class derives
            from :class:`InitArgsMixin`, or a list, tuple or dict of these.

    Raises:
        ValueError: The value is none of these, as a function, a local class, or an object of another class.
    """
    if isinstance(value, (*_PRIMITIVES, Tensor)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_config(item) for item in value]
    if isinstance(value, dict):
        return {to_config(key): to_config(item) for key, item in value.items()}
    if isinstance(value, type):
        return {KIND: "class", "class_path": class_path(value)}
    factory = as_factory(value)
    if factory is not None and isinstance(factory.func, type):
        return _call_config("partial", factory.func, factory.args, factory.keywords)
    if isinstance(value, InitArgsMixin):
        return _call_config("object", type(value), *value.init_args)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    raise ValueError(
        f"{name} cannot be written into a checkpoint; give an importable class, a functools.partial of one, or "
        "numbers, strings and lists of them"
    )


def as_factory(value: Any) -> functools.partial[nn.Module] | None:
    """Return a module class, with arguments bound to it, as a plain ``functools.partial``; None for any other value.

    Args:
        value: A class; a ``functools.partial`` of one; or the partial that jsonargparse makes of a ``class_path``,
            which binds jsonargparse's own function, with the class as the last positional argument.
    """
    if isinstance(value, type) and issubclass(value, nn.Module):
        return functools.partial(value)
    if not isinstance(value, functools.partial):
        return None
    if isinstance(value.func, type):
        return value
    if value.args and isinstance(value.args[-1], type) and value.func.__module__.partition(".")[0] == "jsonargparse":
        return functools.partial(value.args[-1], **value.keywords)
    return None


def _call_config(kind: str, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Describe the call of a class, made already ("object") or to be made ("partial")."""
    config = {KIND: kind, "class_path": class_path(cls), "init_args": to_config(dict(kwargs))}
    return config | ({"args": to_config(list(args))} if args else {})


def from_config(config: Any) -> Any:
    """Rebuild the value that :func:`to_config` described.

    Raises:
        ValueError: The description names a class that is neither of a trusted package nor of an imported module.
    """
    if isinstance(config, list):
        return [from_config(item) for item in config]
    if not isinstance(config, dict):
        return config
    if KIND not in config:
        return {key: from_config(item) for key, item in config.items()}
    cls = trusted_class(config["class_path"])
    if config[KIND] == "class":
        return cls
    args, kwargs = from_config(config.get("args", [])), from_config(config["init_args"])
    return functools.partial(cls, *args, **kwargs) if config[KIND] == "partial" else cls(*args, **kwargs)


def without_weights(config: Any) -> Any:
    """Return a description by :func:`to_config` with all arguments ``weights`` set to None, at any depth."""
    if isinstance(config, list):
        return [without_weights(item) for item in config]
    if not isinstance(config, dict):
        return config
    changed = {key: without_weights(item) for key, item in config.items()}
    if "weights" in changed.get("init_args", {}):
        changed["init_args"]["weights"] = None
    return changed


def trusted_class(path: str) -> type[nn.Module]:
    """Find a class that a checkpoint names, if it may name this class.

    Args:
        path: The dotted path of a subclass of ``torch.nn.Module``.

    Raises:
        ValueError: The class is neither of a trusted package nor of an imported module, does not exist, or is no
            ``nn.Module``.
    """
    module_name, _, name = path.rpartition(".")
    if module_name == "__main__" and not hasattr(sys.modules["__main__"], name):
        raise ValueError(
            f"the checkpoint names the class {name!r}, which was defined in the script that trained it, so it cannot "
            "be imported; put the class into a module, train again with that, and import the module before loading"
        )
    if module_name not in sys.modules:
        if module_name.partition(".")[0] not in TRUSTED_PACKAGES:
            raise ValueError(
                f"the checkpoint names the class {path!r}; a checkpoint may name classes of "
                f"{', '.join(TRUSTED_PACKAGES)}, and of modules that are imported already. If you trust it, import "
                f"{module_name or path!r} before you load the checkpoint"
            )
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(
                f"the checkpoint names the class {path!r}, but {module_name!r} cannot be imported: {error}"
            ) from error
    cls = getattr(sys.modules[module_name], name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(  # noqa: TRY004 - the checkpoint's content is wrong, not the type of an argument
            f"the checkpoint names {path!r} as a class, which is not a subclass of torch.nn.Module here"
        )
    return cls
