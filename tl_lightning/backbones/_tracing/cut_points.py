"""Cut a network into an ordered sequence of named stages, without knowing the network.

:mod:`torch.fx` traces the network and opens only as few modules as a useful cut needs. Every other module stays one
call, so its hooks, randomness and train or eval mode work as in the original. A stage may begin wherever exactly one
tensor that depends on the input is alive.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

MIN_STAGES = 4
"""Modules are opened until the network has this many stages, the depth of a classic feature hierarchy."""

FIRST_STAGE = "stem"
_RESERVED = ("head", "map")  # wherever a stage is given, these mean the classifier and the spatial map


class Trace(NamedTuple):
    """The operations that a network's output needs, with the places where the network can be cut."""

    nodes: list[fx.Node]
    cuts: list[int]
    """Positions in ``nodes``, ascending, after which only the output of that node is alive."""
    starts: dict[str, int]
    """From each stage's name to the cut before it, input to output; -1 for the first stage."""


class _CoarseTracer(fx.Tracer):
    """Trace into the opened modules only."""

    def __init__(self, opened: frozenset[str], leaf_functions: Sequence[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(leaf_functions))
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def trace(model: nn.Module, opened: frozenset[str], leaf_functions: Sequence[Callable[..., Any]] = ()) -> Trace:
    """Trace ``model.forward`` and call every module outside ``opened`` as a whole.

    The code of the opened modules may read ``self.training``; the trace keeps its present value.

    Args:
        model: The network. Its ``forward`` takes images first, and its other arguments keep their defaults.
        opened: Qualified names of the submodules to trace into.
        leaf_functions: Functions that cannot be traced because they depend on sizes; each stays one call.

    Raises:
        Exception: Any error of the tracer, for instance in code that depends on the values of its input.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    graph = _CoarseTracer(opened, leaf_functions).trace(model, defaults)

    needed = {next(node for node in graph.nodes if node.op == "output")}
    pending = list(needed)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                pending.append(node)
    nodes = [node for node in graph.nodes if node in needed]
    cuts = _cut_points(nodes)
    return Trace(nodes, cuts, _stage_starts(model, nodes, cuts))


def depends_on_input(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on the input; the others are constants, computed again wherever they are needed."""
    dependent = {node for node in nodes if node.op == "placeholder"}
    for node in nodes:
        if any(argument in dependent for argument in node.all_input_nodes):
            dependent.add(node)
    return dependent


def _cut_points(nodes: Sequence[fx.Node]) -> list[int]:
    """Return the positions after which one tensor alone carries everything that depends on the input."""
    dependent = depends_on_input(nodes)
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((position.get(user, -1) for user in node.users), default=-1) for node in nodes}
    cuts = []
    alive: set[fx.Node] = set()
    for i, node in enumerate(nodes[:-1]):
        if node in dependent:
            alive.add(node)
        alive = {other for other in alive if last_use[other] > i}
        if alive == {node} and node.op != "placeholder":
            cuts.append(i)
    return cuts


def _has_weight_matrix(module: nn.Module) -> bool:
    """Return whether a module holds a convolution, a linear map or attention, rather than scales and biases alone."""
    return any(p.numel() > max(p.shape, default=1) for p in module.parameters())


def _stage_starts(model: nn.Module, nodes: Sequence[fx.Node], cuts: Sequence[int]) -> dict[str, int]:
    """Start a stage before each module with a weight matrix; norms and activations stay with the stage before."""
    dependent = depends_on_input(nodes)
    weighted = [
        i
        for i, node in enumerate(nodes)
        if node.op == "call_module" and node in dependent and _has_weight_matrix(model.get_submodule(str(node.target)))
    ]
    starts = {FIRST_STAGE: -1}
    for previous, this in itertools.pairwise(weighted):
        between = [cut for cut in cuts if previous <= cut < this]
        if between:
            name = str(nodes[this].target)
            starts.setdefault(f"model.{name}" if name in _RESERVED else name, between[-1])
    return starts


def find_stages(model: nn.Module, leaf_functions: Sequence[Callable[..., Any]] = ()) -> tuple[frozenset[str], Trace]:
    """Open the largest modules one after the other until the network falls into enough stages.

    Args:
        model: The network, in eval mode.
        leaf_functions: See :func:`trace`.

    Returns:
        The names of the opened modules, and the trace into them.

    Raises:
        Exception: Any error of the tracer in the network's outermost ``forward``.
    """
    opened: frozenset[str] = frozenset()
    best = trace(model, opened, leaf_functions)
    tried: set[str] = set()
    while len(best.starts) < MIN_STAGES:
        candidates = {
            str(node.target): model.get_submodule(str(node.target)) for node in best.nodes if node.op == "call_module"
        }
        weighted_children = {
            name: [child for child in module.children() if _has_weight_matrix(child)]
            for name, module in candidates.items()
            if name not in tried
        }
        name = max(
            (name for name, children in weighted_children.items() if children),
            key=lambda name: _parameter_count(candidates[name]),
            default=None,
        )
        if name is None:
            break
        tried.add(name)
        try:
            attempt = trace(model, opened | {name}, leaf_functions)
        except Exception:  # noqa: S112, BLE001 - a module that cannot be traced stays one call
            continue
        gained = len(attempt.starts) - len(best.starts)
        if gained > 0 or (gained == 0 and len(weighted_children[name]) == 1):
            opened, best = opened | {name}, attempt
    return opened, best


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
