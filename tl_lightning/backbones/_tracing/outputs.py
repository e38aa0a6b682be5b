"""Run a traced network and look at the outputs of its operations."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn


class _Interpreter(fx.Interpreter):
    """Pass lists that a module may write into, as the network's own code does (HRNet)."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(part) for part in value]
    return tuple(map(_mutable, value)) if type(value) is tuple else value


def run(model: nn.Module, nodes: Sequence[fx.Node], images: Tensor) -> dict[fx.Node, Any]:
    """Run a trace once and return the output of each of its operations."""
    interpreter = _Interpreter(model, graph=nodes[0].graph)
    with torch.inference_mode():
        for node in nodes:
            interpreter.env[node] = images if node.op == "placeholder" else interpreter.run_node(node)
    return interpreter.env


def is_batch(output: Any) -> TypeGuard[Tensor]:
    """Return whether an output for two images is a tensor with the batch first."""
    return isinstance(output, Tensor) and output.ndim >= 2 and len(output) == 2


def is_map(output: Any) -> bool:
    """Return whether an output for two images is a spatial map, or tokens."""
    if not is_batch(output):
        return False
    if output.ndim == 4:
        return output.shape.numel() > output.shape[0] * max(output.shape[1:])  # not pooled to 1 x 1
    return output.ndim == 3 and output.shape[1] > 1
