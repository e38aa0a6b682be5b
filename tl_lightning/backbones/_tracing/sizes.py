"""Recognize the values inside a network that depend on the shape of the images, and not on their pixels.

A rotary table or the grid of the patches stays alive from block to block. Both sides of a cut can compute it again from
a few sizes, so it need not cross the cut. The part after a cut sees the activations alone. It therefore takes the sizes
that the network's own image size gives, and the part before the cut checks that they are right.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tl_lightning.backbones._tracing.outputs import run

_BATCHES = 2, 1
"""Two batch sizes tell a number that counts images from a constant."""


class _PerImage(NamedTuple):
    """A number that is proportional to the batch size."""

    factor: int


class _Shape(NamedTuple):
    """A ``torch.Size``."""

    sides: tuple[Any, ...]


class _Unknown:
    """A value that is no size."""


Sizes = Mapping[str, Any]
"""From the name of an operation to its output, for outputs made of sizes alone."""


def depends_on_pixels(nodes: Sequence[fx.Node], sizes: Sizes) -> set[fx.Node]:
    """Return the operations whose output depends on pixels; both sides of a cut can compute the others.

    Args:
        nodes: The operations of a trace.
        sizes: See :func:`find_sizes`; without sizes, all operations that depend on the input are returned.
    """
    dependent: set[fx.Node] = set()
    from_sizes: set[fx.Node] = set()
    for node in nodes:
        inputs = node.all_input_nodes
        on_pixels = sum(argument in dependent for argument in inputs)
        on_sizes = any(argument in from_sizes for argument in inputs)
        if on_pixels == 1 and node.name in sizes:
            from_sizes.add(node)
        elif node.op == "placeholder" or on_pixels or (on_sizes and node.op == "call_module"):
            dependent.add(node)  # a module runs on one side alone: it may have weights, statistics and dropout
        elif on_sizes:
            from_sizes.add(node)
    return dependent


def find_sizes(
    model: nn.Module, nodes: Sequence[fx.Node], image_shape: tuple[int, int]
) -> tuple[Sizes, dict[fx.Node, Any]]:
    """Run a trace on two batches to find the outputs that are made of sizes alone.

    Args:
        model: The traced network, in eval mode.
        nodes: The operations of the trace.
        image_shape: Height and width of the images.

    Returns:
        The outputs that are sizes, by the name of the operation, and all outputs for two images. There are no sizes if
        the network draws random numbers to make more of them, since two parts of the network would draw differently.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (run(model, nodes, torch.rand(batch, 3, *image_shape)) for batch in _BATCHES)
        found = {node.name: _common(first[node], second[node]) for node in nodes if node.op != "output"}
        sizes = {name: size for name, size in found.items() if size is not _Unknown}
        if _draws_random_numbers(model, nodes, sizes, first):
            sizes = {}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])  # a trace of train mode may update statistics
    return sizes, first


def size_names(outputs: Mapping[fx.Node, Any]) -> Sizes:
    """Return the operations whose output in one run is made of sizes alone."""
    return {node.name: None for node, output in outputs.items() if _common(output, output) is not _Unknown}


def _common(first: Any, second: Any) -> Any:
    """Describe an output by its values for two batches."""
    if type(first) is not type(second):
        return _Unknown
    if isinstance(first, (tuple, list)):
        if len(first) != len(second):
            return _Unknown
        parts = [_common(a, b) for a, b in zip(first, second, strict=True)]
        if _Unknown in parts or type(first) not in (tuple, list, torch.Size):
            return _Unknown
        return _Shape(tuple(parts)) if isinstance(first, torch.Size) else type(first)(parts)
    if type(first) is int and first != second:
        factor = first // _BATCHES[0]
        return _PerImage(factor) if (first, second) == tuple(factor * batch for batch in _BATCHES) else _Unknown
    known = first is None or isinstance(first, (int, str, torch.device))
    return first if known and first == second else _Unknown


def _draws_random_numbers(
    model: nn.Module, nodes: Sequence[fx.Node], sizes: Sizes, outputs: Mapping[fx.Node, Any]
) -> bool:
    dependent = depends_on_pixels(nodes, sizes)
    interpreter = fx.Interpreter(model, graph=nodes[0].graph)
    interpreter.env = dict(outputs)
    with torch.inference_mode():
        for node in nodes:
            if node not in dependent and node.op in ("call_function", "call_method"):
                before = torch.get_rng_state()
                interpreter.run_node(node)
                if not torch.equal(before, torch.get_rng_state()):
                    return True
    return False


def write_size(graph: fx.Graph, size: Any, inputs: fx.Node) -> Any:
    """Write a size into a graph, for the batch size and the device of a tensor of the graph."""
    if isinstance(size, _PerImage):
        shape = graph.call_function(getattr, (inputs, "shape"))
        batch = graph.call_function(operator.getitem, (shape, 0))
        return batch if size.factor == 1 else graph.call_function(operator.mul, (batch, size.factor))
    if isinstance(size, _Shape):
        return graph.call_function(torch.Size, (tuple(write_size(graph, side, inputs) for side in size.sides),))
    if isinstance(size, (tuple, list)):
        return type(size)(write_size(graph, part, inputs) for part in size)
    if isinstance(size, torch.device):
        return graph.call_function(getattr, (inputs, "device"))
    return size


def sizes_across(nodes: Sequence[fx.Node], dependent: set[fx.Node], sources: set[fx.Node], end: int) -> list[fx.Node]:
    """Return the sizes of some tensors that operations after a cut need.

    Args:
        nodes: The operations of a trace.
        dependent: Those that depend on pixels.
        sources: The tensors.
        end: Position of the cut.
    """
    late = set(nodes[end + 1 :]) & dependent
    found = []
    for node in nodes:
        if node not in dependent and any(argument in sources for argument in node.all_input_nodes):
            users: set[fx.Node] = set()
            pending = [node]
            while pending:
                users |= (new := set(pending.pop().users) - users)
                pending += new - dependent
            if users & late:
                found.append(node)
    return found


def check_sizes(found: Any, expected: Any) -> None:
    """Check the sizes that the part of a network after a cut takes as given.

    Raises:
        ValueError: They are different, since the images are not as large as those that the network was cut for.
    """
    if found != expected:
        raise ValueError(
            f"a cut network takes only images of the size in its preprocessing: sizes inside it are {found}, and "
            f"{expected} was expected. Resize the images, or build the backbone with image_size"
        )
