"""Cut a network into an ordered sequence of named stages, without knowing the network.

The network is traced with :mod:`torch.fx`, opening only as few of its modules as a useful cut needs; every other module
stays one call, so its own hooks, randomness and train/eval mode work as in the original. A stage may begin wherever
exactly one tensor that depends on the input is alive.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

MIN_STAGES = 4
"""Modules are opened until at least this many stages appear, the depth of a classic feature hierarchy."""

FIRST_STAGE = "stem"


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
            starts.setdefault(str(nodes[this].target), between[-1])
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


class Segment(nn.Module):
    """Run a contiguous part of a network on the network's own, live modules.

    The modules stay where they are: this one lists those that it calls as its own, under their own names, so that
    ``parameters()``, ``train()`` and ``state_dict()`` speak of this part alone; none is copied.

    Args:
        model: The network that was traced.
        traces: The network's trace in eval mode and in train mode.
        begin: Position of the cut before the first operation, for each of the two traces; -1 for the input.
        end: Position of the last operation, for each of the two traces.

    Shape:
        Input: what comes out at ``begin``. Output: what comes out at ``end``; both have the batch first.
    """

    def __init__(
        self, model: nn.Module, traces: tuple[Trace, Trace], begin: tuple[int, int], end: tuple[int, int]
    ) -> None:
        super().__init__()
        self._live = (model,)  # in a tuple: not registered, since only part of it is this segment's
        self._code: list[Callable[[nn.Module, Tensor], Tensor]] = []
        self._called: dict[str, nn.Module] = {}
        for one_trace, first, last in zip(traces, begin, end, strict=True):
            graph = _subgraph(one_trace.nodes, first, last)
            self._code.append(_compile(graph))
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    self._list(model, str(node.target))
                if node.op == "call_module":
                    self._called[str(node.target)] = model.get_submodule(str(node.target))

    def _list(self, model: nn.Module, target: str) -> None:
        here: nn.Module = self
        there = model
        *path, leaf = target.split(".")
        for part in path:
            there = there.get_submodule(part)
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        item = getattr(there, leaf)
        if isinstance(item, nn.Module):
            here.add_module(leaf, item)
        elif isinstance(item, nn.Parameter):
            here.register_parameter(leaf, item)
        else:
            here.register_buffer(leaf, item)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the part on what comes out at its beginning."""
        # The mode is the called modules' own: whoever switches the network switches this part of it as well.
        training = any(module.training for module in self._called.values())
        return self._code[training](self._live[0], inputs)


def _subgraph(nodes: Sequence[fx.Node], begin: int, end: int) -> fx.Graph:
    """Copy the operations after ``begin`` up to ``end``, and the constants that they need, to a graph of their own."""
    dependent = depends_on_input(nodes)
    graph = fx.Graph()
    source = nodes[begin] if begin >= 0 else next(node for node in nodes if node.op == "placeholder")
    copies = {source: graph.placeholder("inputs")}
    inside = nodes[begin + 1 : end + 1]
    wanted = {node for node in inside if node in dependent and node.op not in ("placeholder", "output")}
    pending = list(wanted)
    while pending:
        constants = {a for a in pending.pop().all_input_nodes if a not in dependent and a not in wanted}
        wanted |= constants
        pending += constants
    for node in nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[end]] if nodes[end].op != "output" else copies[nodes[end].all_input_nodes[0]])
    return graph


def _compile(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)  # noqa: S102 - torch.fx's own generated source, as its GraphModule does
    function: Callable[[nn.Module, Tensor], Tensor] = namespace["forward"]
    return function
