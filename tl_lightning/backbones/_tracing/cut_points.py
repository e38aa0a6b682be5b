"""Cut a network into an ordered sequence of named stages, without knowing the network.

The network is traced with :mod:`torch.fx`, opening only as few of its modules as a useful cut needs; every other module
stays one call, so its own hooks, randomness and train/eval mode work as in the original. A stage may begin wherever
exactly one tensor that depends on the input is alive.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

MIN_STAGES = 4
"""Modules are opened until at least this many stages appear, the depth of a classic feature hierarchy."""

FIRST_STAGE = "stem"
_RESERVED = ("head", "map")  # mean the classifier and the spatial map wherever a stage is given


class Trace(NamedTuple):
    """A network as the list of operations that its output needs, with the places where it may be cut."""

    nodes: list[fx.Node]
    cuts: list[int]
    """Positions in ``nodes``, ascending, after which only that node's output is alive."""
    starts: dict[str, int]
    """Stage name to the cut right before it, input to output; -1 for the first."""


class _CoarseTracer(fx.Tracer):
    def __init__(self, opened: frozenset[str], leaf_functions: Sequence[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(leaf_functions))
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def trace(model: nn.Module, opened: frozenset[str], leaf_functions: Sequence[Callable[..., Any]] = ()) -> Trace:
    """Trace ``model.forward``, calling every module that is not in ``opened`` as a whole.

    Whatever the opened modules' own code asks of ``self.training`` is fixed to its value at this moment.

    Args:
        model: The network; its ``forward`` takes images first, and its other arguments keep their defaults.
        opened: Qualified names of the submodules to look into.
        leaf_functions: Functions that depend on sizes in a way that cannot be traced; they stay one call.

    Raises:
        Exception: Whatever the tracer meets in code that depends on its input's values.
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
    return Trace(nodes, cuts, _starts(model, nodes, cuts))


def depends_on_input(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that change with the input; the others are constants, made again wherever they are needed."""
    dependent = {node for node in nodes if node.op == "placeholder"}
    for node in nodes:
        if any(argument in dependent for argument in node.all_input_nodes):
            dependent.add(node)
    return dependent


def _cut_points(nodes: Sequence[fx.Node]) -> list[int]:
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


def has_matrix(module: nn.Module) -> bool:
    """Return whether the module holds more than scales and biases: a convolution, a linear map, attention."""
    return any(p.numel() > max(p.shape, default=1) for p in module.parameters())


def _starts(model: nn.Module, nodes: Sequence[fx.Node], cuts: Sequence[int]) -> dict[str, int]:
    """Begin a stage right before each module with weights; norms, activations and pools go with the stage before."""
    dependent = depends_on_input(nodes)
    weighty = [
        i
        for i, node in enumerate(nodes)
        if node.op == "call_module" and node in dependent and has_matrix(model.get_submodule(str(node.target)))
    ]
    starts = {FIRST_STAGE: -1}
    for previous, this in itertools.pairwise(weighty):
        between = [cut for cut in cuts if previous <= cut < this]
        if between:
            name = str(nodes[this].target)
            starts.setdefault(f"model.{name}" if name in _RESERVED else name, between[-1])
    return starts


def find_stages(model: nn.Module, leaf_functions: Sequence[Callable[..., Any]] = ()) -> tuple[frozenset[str], Trace]:
    """Open the largest modules, one after the other, until the network falls into stages.

    Args:
        model: The network, in eval mode.
        leaf_functions: As for :func:`trace`.

    Returns:
        The names of the opened modules and the trace with these opened.

    Raises:
        Exception: Whatever the tracer meets in the network's outermost ``forward``.
    """
    opened: frozenset[str] = frozenset()
    best = trace(model, opened, leaf_functions)
    tried: set[str] = set()
    while len(best.starts) < MIN_STAGES:
        candidates = {
            str(node.target): model.get_submodule(str(node.target)) for node in best.nodes if node.op == "call_module"
        }
        inner = {
            name: [child for child in module.children() if has_matrix(child)]
            for name, module in candidates.items()
            if name not in tried
        }
        name = max((n for n, children in inner.items() if children), key=lambda n: _size(candidates[n]), default=None)
        if name is None:
            break
        tried.add(name)
        try:
            attempt = trace(model, opened | {name}, leaf_functions)
        except Exception:  # noqa: S112, BLE001 - a module that cannot be traced stays closed
            continue
        gained = len(attempt.starts) - len(best.starts)
        if gained > 0 or (gained == 0 and len(inner[name]) == 1):
            opened, best = opened | {name}, attempt
    return opened, best


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
