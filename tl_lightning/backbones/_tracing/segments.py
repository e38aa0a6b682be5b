"""Parts of a traced network that run on the network's own modules."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from tl_lightning.backbones._tracing.cut_points import Trace, depends_on_input

Cut = tuple[int, int]
"""Position of a cut in the trace of eval mode and in that of train mode; -1 for the input."""

Then = Callable[[Tensor], Tensor]
"""Something without parameters that is done to what a part made, the same in both modes."""


@dataclass(frozen=True)
class _Piece:
    """One stage of a part."""

    name: str
    model: nn.Module
    code: tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]
    called: tuple[nn.Module, ...]

    def __call__(self, inputs: Tensor, /) -> Tensor:
        # The mode is the called modules' own: whoever switches a stage switches the code between its modules as well.
        training = any(module.training for module in self.called)
        return self.code[training](self.model, inputs)


class Segment(nn.Module):
    """Run some consecutive stages of a network, each in its own mode, on the network's own, live modules.

    The modules stay where they are: this one lists those that it calls as its own, under their own names, so that
    ``parameters()``, ``train()`` and ``state_dict()`` speak of this part alone; none is copied.

    Args:
        model: The network that was traced.
        traces: The network's trace in eval mode and in train mode.
        cuts: Where the first stage begins, where each further one begins, and where the last one ends.
        names: Names of the stages, one fewer than cuts.
        then: What is done to the output of the last stage; None leaves it as it is.

    Shape:
        Input: what comes out at the first cut. Output: what comes out at the last; both have the batch first.
    """

    def __init__(
        self,
        model: nn.Module,
        traces: tuple[Trace, Trace],
        cuts: Sequence[Cut],
        names: Sequence[str],
        then: Then | None = None,
    ) -> None:
        super().__init__()
        self._pieces: list[_Piece] = []
        for name, begin, end in zip(names, cuts[:-1], cuts[1:], strict=True):
            graphs = [_subgraph(t.nodes, *ends) for t, ends in zip(traces, zip(begin, end, strict=True), strict=True)]
            nodes = [node for graph in graphs for node in graph.nodes]
            for target in {str(node.target): None for node in nodes if node.op in ("call_module", "get_attr")}:
                self._register(model, target)
            called = {str(node.target): None for node in nodes if node.op == "call_module"}
            code = (_compile(model, graphs[0]), _compile(model, graphs[1]))
            self._pieces.append(_Piece(name, model, code, tuple(model.get_submodule(target) for target in called)))
        if then is not None:
            self._pieces.append(_Piece("then", model, (lambda _, output: then(output),) * 2, ()))

    def _register(self, model: nn.Module, target: str) -> None:
        """List a module or tensor of the network as this module's own, under the same name."""
        path, _, leaf = target.rpartition(".")
        parent: nn.Module = self
        for part in filter(None, path.split(".")):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        value = getattr(model.get_submodule(path), leaf)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            parent.register_buffer(leaf, value)
        else:
            setattr(parent, leaf, value)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the stages on what comes out at their beginning."""
        for piece in self._pieces:
            inputs = piece(inputs)
        return inputs


def stages_of(segment: Segment) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Return the stages of a segment by name, in order; each takes what the one before made.

    This is no method, since a segment's attributes are the network's own modules, whatever these are called.
    """
    return ((piece.name, piece) for piece in segment._pieces)


def called_by(segment: Segment) -> list[nn.Module]:
    """Return the network's modules that a segment calls, each once."""
    return list({id(module): module for piece in segment._pieces for module in piece.called}.values())


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


def _compile(model: nn.Module, graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    # Called with the network itself, this finds the tensors that the network has then: ``to()`` replaces buffers.
    return type(fx.GraphModule(model, graph)).forward
