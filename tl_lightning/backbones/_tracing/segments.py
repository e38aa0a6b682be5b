"""Run consecutive stages of a traced network on the network's own modules."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from tl_lightning.backbones._tracing.cut_points import Trace
from tl_lightning.backbones._tracing.sizes import check_sizes, depends_on_pixels, sizes_across, write_size

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
        last: Whether no stage of the network runs after the segment. Otherwise the segment checks the sizes that the
            stages after it take as given.

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
        *,
        last: bool = True,
    ) -> None:
        super().__init__()
        self._segment_stages: list[_Stage] = []
        for name, start, end in zip(names, cuts[:-1], cuts[1:], strict=True):
            checked = not (last and end == cuts[-1])
            graphs = [_subgraph(traces[mode], start[mode], end[mode], checked) for mode in (0, 1)]
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


def _subgraph(trace: Trace, start: int, end: int, checked: bool) -> fx.Graph:
    """Copy the operations after ``start`` up to ``end`` into a new graph.

    The constants that they need are copied too. The sizes that they need from before ``start`` are written as those of
    the network's image size.

    Args:
        trace: The operations of the network.
        start: Cut before the graph; -1 for the images.
        end: Cut at the end of the graph.
        checked: Check the sizes of this graph that are written into a later one.
    """
    nodes, sizes = trace.nodes, trace.cuts.sizes
    dependent = depends_on_pixels(nodes, sizes)
    graph = fx.Graph()
    source = nodes[start] if start >= 0 else next(node for node in nodes if node.op == "placeholder")
    inputs = graph.placeholder("inputs")
    copies: dict[fx.Node, Any] = {source: inputs}
    inside = {n for n in nodes[start + 1 : end + 1] if n in dependent and n.op not in ("placeholder", "output")}

    def is_before(node: fx.Node) -> bool:
        return any(a in dependent and a is not source and a not in inside for a in node.all_input_nodes)

    to_check = sizes_across(nodes, dependent, {source} | inside - {nodes[end]}, end) if checked else []
    needed = inside | set(to_check)
    pending = list(needed)
    while pending:
        node = pending.pop()
        if node in dependent or not is_before(node):
            found = {a for a in node.all_input_nodes if a not in dependent and a not in needed}
            needed |= found
            pending += found
    for node in nodes:
        if node in needed:
            written = node not in dependent and is_before(node)
            copies[node] = (
                write_size(graph, sizes[node.name], inputs) if written else graph.node_copy(node, copies.__getitem__)
            )
    if to_check:
        expected = [write_size(graph, sizes[node.name], inputs) for node in to_check]
        graph.call_function(check_sizes, ([copies[node] for node in to_check], expected))
    graph.output(copies[nodes[end]] if nodes[end].op != "output" else copies[nodes[end].all_input_nodes[0]])
    return graph


def _compile(model: nn.Module, graph: fx.Graph) -> _Forward:
    # Each call gets the network itself and so reads its present tensors: nn.Module.to() replaces buffers.
    return type(fx.GraphModule(model, graph)).forward
