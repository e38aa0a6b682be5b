"""Cut a network into an ordered sequence of named stages, without knowing the network.

:mod:`torch.fx` traces the network and opens only as few modules as a useful cut needs. Every other module stays one
call, so its hooks, randomness and train or eval mode work as in the original. A stage may begin wherever exactly one
tensor that depends on the pixels is alive.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tl_lightning.backbones._tracing.outputs import is_batch, run
from tl_lightning.backbones._tracing.sizes import Sizes, depends_on_pixels, find_sizes, size_names
from tl_lightning.backbones._tracing.tracer import LeafFunctions, trace_operations

MIN_STAGES = 4
"""Modules are opened until the network has this many stages, the depth of a classic feature hierarchy."""

FIRST_STAGE = "stem"
_Outputs = Mapping[fx.Node, Any]
_RESERVED = ("head", "map")  # wherever a stage is given, these mean the classifier and the spatial map


class Cuts(NamedTuple):
    """The places where a network can be cut."""

    positions: list[int]
    """Positions among the operations, ascending, after which only the output of that operation is alive."""
    starts: dict[str, int]
    """From each stage's name to the cut before it, input to output; -1 for the first stage."""
    sizes: Sizes
    """The outputs that may be alive at a cut besides, since they depend on shapes alone; often none."""


class Trace(NamedTuple):
    """The operations that a network's output needs, with the places where the network can be cut."""

    nodes: list[fx.Node]
    cuts: Cuts


class Found(NamedTuple):
    """The stages of a network."""

    opened: frozenset[str]
    """Qualified names of the modules that are traced into."""
    nodes: list[fx.Node]
    """The operations of eval mode."""
    outputs: _Outputs
    """Their outputs for two images."""
    cuts: Cuts
    """The cuts of eval mode."""
    train_cuts: Cuts | None
    """The cuts of train mode where they need sizes; None if the operations alone give the cuts."""


def cut_operations(model: nn.Module, nodes: Sequence[fx.Node], sizes: Sizes, outputs: _Outputs | None = None) -> Cuts:
    """Find the places where the operations of a trace can be cut.

    Args:
        model: The traced network.
        nodes: The operations.
        sizes: Outputs that may be alive at a cut (see :func:`find_sizes`).
        outputs: Outputs for two images; with them, only cuts at a tensor with the batch first are returned.
    """
    positions = _cut_points(nodes, sizes)
    if outputs is not None:
        positions = [cut for cut in positions if is_batch(outputs[nodes[cut]])]
    return Cuts(positions, _stage_starts(model, nodes, positions, sizes), sizes)


def _cut_points(nodes: Sequence[fx.Node], sizes: Sizes) -> list[int]:
    """Return the positions after which one tensor alone carries everything that depends on the pixels."""
    dependent = depends_on_pixels(nodes, sizes)
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {
        node: max((position.get(user, -1) for user in node.users if user in dependent), default=-1) for node in nodes
    }
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


def _stage_starts(model: nn.Module, nodes: Sequence[fx.Node], cuts: Sequence[int], sizes: Sizes) -> dict[str, int]:
    """Start a stage before each module with a weight matrix; norms and activations stay with the stage before."""
    dependent = depends_on_pixels(nodes, sizes)
    weighted = [
        i
        for i, node in enumerate(nodes)
        if node.op == "call_module"
        and any(argument in dependent for argument in node.all_input_nodes)
        and _has_weight_matrix(model.get_submodule(str(node.target)))
    ]
    starts = {FIRST_STAGE: -1}
    for previous, this in itertools.pairwise(weighted):
        between = [cut for cut in cuts if previous <= cut < this]
        if between:
            name = str(nodes[this].target)
            starts.setdefault(f"model.{name}" if name in _RESERVED else name, between[-1])
    return starts


def find_stages(model: nn.Module, image_shape: tuple[int, int], leaf_functions: LeafFunctions = ()) -> Found:
    """Find the stages of a network.

    Values that depend on the shape of the images alone count as alive at first. Only where they prevent stages, the
    network is cut again without them, which takes longer.

    Args:
        model: The network, in eval mode.
        image_shape: Height and width of the images.
        leaf_functions: See :func:`trace_operations`.

    Raises:
        Exception: Any error of the network, or of the tracer in the network's outermost ``forward``.
    """

    def cut_plainly(nodes: Sequence[fx.Node]) -> tuple[Cuts, _Outputs]:
        return cut_operations(model, nodes, {}), {}

    def cut_across_sizes(nodes: Sequence[fx.Node]) -> tuple[Cuts, _Outputs]:
        sizes, outputs = find_sizes(model, nodes, image_shape)
        return cut_operations(model, nodes, sizes, outputs), outputs

    opened, nodes, cuts, _ = _open_modules(model, leaf_functions, cut_plainly)
    outputs: _Outputs = run(model, nodes, torch.zeros(2, 3, *image_shape))
    usable = {stage: cut for stage, cut in cuts.starts.items() if cut < 0 or is_batch(outputs[nodes[cut]])}
    if cut_operations(model, nodes, size_names(outputs), outputs).starts.keys() <= usable.keys():
        return Found(opened, nodes, outputs, cuts._replace(starts=usable), None)

    opened, nodes, cuts, outputs = _open_modules(model, leaf_functions, cut_across_sizes)
    train_nodes = trace_operations(model, opened, leaf_functions, training=True)
    same = [node.format_node() for node in nodes] == [node.format_node() for node in train_nodes]
    return Found(opened, nodes, outputs, cuts, cuts if same else cut_across_sizes(train_nodes)[0])


def _open_modules(
    model: nn.Module,
    leaf_functions: LeafFunctions,
    cut: Callable[[Sequence[fx.Node]], tuple[Cuts, _Outputs]],
) -> tuple[frozenset[str], list[fx.Node], Cuts, _Outputs]:
    """Open the largest modules one after the other until the network falls into enough stages."""
    opened: frozenset[str] = frozenset()
    nodes = trace_operations(model, opened, leaf_functions)
    best, outputs = cut(nodes)
    tried: set[str] = set()
    while len(best.starts) < MIN_STAGES:
        candidates = {
            str(node.target): model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"
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
            attempt_nodes = trace_operations(model, opened | {name}, leaf_functions)
            attempt, attempt_outputs = cut(attempt_nodes)
        except Exception:  # noqa: S112, BLE001 - a module that cannot be traced stays one call
            continue
        gained = len(attempt.starts) - len(best.starts)
        if gained > 0 or (gained == 0 and len(weighted_children[name]) == 1):
            opened, nodes, best, outputs = opened | {name}, attempt_nodes, attempt, attempt_outputs
    return opened, nodes, best, outputs


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
