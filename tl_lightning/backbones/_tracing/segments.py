"""Run consecutive stages of a traced network on the network's own modules."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from tl_lightning.backbones._tracing.cut_points import Trace, depends_on_input

Cut = tuple[int, int]
"""Position of a cut in the trace of eval mode and in the trace of train mode; -1 for the input."""

Pooling = Callable[[Tensor], Tensor]
"""A function without parameters that ends a segment, the same in both modes."""

_Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class _Stage:
    """One stage of a segment."""

    name: str
    model: nn.Module
    forward: tuple[_Forward, _Forward]
    """The code of eval mode and the code of train mode."""
    called: tuple[nn.Module, ...]

    def __call__(self, inputs: Tensor, /) -> Tensor:
        # The called modules decide on the mode: switching a stage also switches the code between its modules.
        training = any(module.training for module in self.called)
        return self.forward[training](self.model, inputs)


class Segment(nn.Module):
    """Run consecutive stages of a network, each in its own mode, on the network's own modules.

    Nothing is copied. The segment registers the modules that it calls under the names that they have in the network, so
    ``parameters()``, ``train()`` and ``state_dict()`` cover this segment alone.

    Args:
        model: The traced network.
        traces: The traces of the network in eval mode and in train mode.
        cuts: The start of each stage, and the end of the last one.
        names: Names of the stages, one fewer than cuts.
        pooling: Applied to the output of the last stage; None returns that output.

    Shape:
        Input: the activations at the first cut. Output: the activations at the last cut. Both have the batch first.
    """

    def __init__(
        self,
        model: nn.Module,
        traces: tuple[Trace, Trace],
        cuts: Sequence[Cut],
        names: Sequence[str],
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self._segment_stages: list[_Stage] = []
        for name, start, end in zip(names, cuts[:-1], cuts[1:], strict=True):
            graphs = [_subgraph(t.nodes, *ends) for t, ends in zip(traces, zip(start, end, strict=True), strict=True)]
            nodes = [node for graph in graphs for node in graph.nodes]
            for target in {str(node.target): None for node in nodes if node.op in ("call_module", "get_attr")}:
                self._register(model, target)
            called = {str(node.target): None for node in nodes if node.op == "call_module"}
            forward = (_compile(model, graphs[0]), _compile(model, graphs[1]))
            modules = tuple(model.get_submodule(target) for target in called)
            self._segment_stages.append(_Stage(name, model, forward, modules))
        if pooling is not None:
            self._segment_stages.append(_Stage("<pooling>", model, (lambda _, features: pooling(features),) * 2, ()))

    def _register(self, model: nn.Module, target: str) -> None:
        """Register a module or tensor of the network under its own name."""
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
        """Run the stages one after the other."""
        for stage in self._segment_stages:
            inputs = stage(inputs)
        return inputs


def stages_of(segment: Segment) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Return the stages of a segment by name, in order; each takes the output of the one before.

    This is a function, since any attribute of a segment may be a module of the network, under the network's name.
    """
    return ((stage.name, stage) for stage in segment._segment_stages)


def called_modules(segment: Segment) -> list[nn.Module]:
    """Return the modules of the network that a segment calls, each once."""
    return list({id(module): module for stage in segment._segment_stages for module in stage.called}.values())


def _subgraph(nodes: Sequence[fx.Node], start: int, end: int) -> fx.Graph:
    """Copy the operations after ``start`` up to ``end``, and the constants that they need, into a new graph."""
    dependent = depends_on_input(nodes)
    graph = fx.Graph()
    source = nodes[start] if start >= 0 else next(node for node in nodes if node.op == "placeholder")
    copies = {source: graph.placeholder("inputs")}
    inside = nodes[start + 1 : end + 1]
    needed = {node for node in inside if node in dependent and node.op not in ("placeholder", "output")}
    pending = list(needed)
    while pending:
        constants = {a for a in pending.pop().all_input_nodes if a not in dependent and a not in needed}
        needed |= constants
        pending += constants
    for node in nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[end]] if nodes[end].op != "output" else copies[nodes[end].all_input_nodes[0]])
    return graph


def _compile(model: nn.Module, graph: fx.Graph) -> _Forward:
    # Each call gets the network itself and so reads its present tensors: nn.Module.to() replaces buffers.
    return type(fx.GraphModule(model, graph)).forward
