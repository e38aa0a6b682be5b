"""Trace the operations of a network with :mod:`torch.fx`, and call most of its modules as a whole."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

LeafFunctions = Sequence[Callable[..., Any]]


class _CoarseTracer(fx.Tracer):
    """Trace into the opened modules only."""

    def __init__(self, opened: frozenset[str], leaf_functions: LeafFunctions, follow_buffers: bool) -> None:
        super().__init__(autowrap_functions=tuple(leaf_functions))
        self.opened = opened
        self.follow_buffers = follow_buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.follow_buffers and isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val:
                    if name not in parameter_proxy_cache:
                        node = self.create_node("get_attr", name, (), {})
                        parameter_proxy_cache[name] = _Buffer(node, self, buffer)
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Buffer(fx.Proxy):
    """A buffer in a trace; its shape is known, so the traced code may decide on it."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape = buffer.shape
        self.ndim = buffer.ndim

    def numel(self) -> int:
        return self.shape.numel()


def trace_operations(
    model: nn.Module, opened: frozenset[str], leaf_functions: LeafFunctions = (), *, training: bool = False
) -> list[fx.Node]:
    """Trace ``model.forward``, and return the operations that its output needs, in order.

    Args:
        model: The network. Its ``forward`` takes images first, and its other arguments keep their defaults.
        opened: Qualified names of the submodules to trace into; every other module is called as a whole.
        leaf_functions: Functions that cannot be traced because they depend on sizes; each stays one call.
        training: Mode of the network; the code of opened modules may read ``self.training``.

    Raises:
        Exception: Any error of the tracer, for instance in code that depends on the values of its input.
    """
    with _mode(model, training):
        nodes = _needed(_trace(model, opened, leaf_functions, follow_buffers=False))
        if any(map(_is_baked, nodes)):
            try:
                return _needed(_trace(model, opened, leaf_functions, follow_buffers=True))
            except Exception:  # noqa: BLE001 - code that decides on the values of its buffers
                return nodes
        return nodes


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    # Calling train() could run code of the network, and the trace of an unopened module's method reads the flag too.
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _trace(model: nn.Module, opened: frozenset[str], leaf_functions: LeafFunctions, follow_buffers: bool) -> fx.Graph:
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return _CoarseTracer(opened, leaf_functions, follow_buffers).trace(model, defaults)


def _needed(graph: fx.Graph) -> list[fx.Node]:
    needed = {next(node for node in graph.nodes if node.op == "output")}
    pending = list(needed)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                pending.append(node)
    return [node for node in graph.nodes if node in needed]


def _is_baked(node: fx.Node) -> bool:
    """Return whether an operation keeps a tensor or device of now, so that it would not follow the network to a GPU."""
    devices: list[torch.device] = []
    fx.node.map_aggregate(
        (node.args, node.kwargs), lambda value: devices.append(value) if isinstance(value, torch.device) else None
    )
    return bool(devices) or (node.op == "get_attr" and str(node.target).startswith("_tensor_constant"))
