"""Compute the activations of a backbone at its boundaries."""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from tl_lightning.backbones import Backbone, Segment, stages_of
from tl_lightning.freezing import HEAD, MAP
from tl_lightning.utils.messages import unknown


def prefix_of(backbone: Backbone, boundary: str) -> nn.Module:
    """Return the stages of a backbone before a boundary; the whole backbone for ``"head"`` and ``"map"``.

    Raises:
        ValueError: The backbone has no such stage.
    """
    if boundary in (HEAD, MAP):
        return backbone
    if boundary not in backbone.stages:
        raise ValueError(unknown("boundary", boundary, [*backbone.stages, MAP, HEAD]))
    return backbone.split(boundary)[0]


def reference_tensor(network: nn.Module) -> Tensor:
    """Return a tensor with the dtype and on the device in which a network computes."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def activations(backbone: Backbone, images: Tensor, boundaries: Collection[str]) -> dict[str, Tensor]:
    """Compute the activations at each boundary, in one pass where the backbone allows it.

    Args:
        backbone: The network, in eval mode.
        images: (N, 3, H, W).
        boundaries: Names of stages, for the input of that stage; ``"head"`` for the pooled features, ``"map"`` for the
            spatial map.

    Returns:
        Activations (N, ...) by boundary.

    Raises:
        ValueError: The backbone has no such stage.
    """
    inside = [boundary for boundary in boundaries if boundary not in (HEAD, MAP)]
    found = {MAP: backbone.forward_map(images)} if MAP in boundaries else {}
    whole = backbone.split(backbone.stages[0])[1] if inside else None
    if not isinstance(whole, Segment):
        found |= {boundary: backbone.split(boundary)[0](images) for boundary in inside}
        return found | ({HEAD: backbone(images)} if HEAD in boundaries else {})
    current = images
    for stage, run in stages_of(whole):
        if stage in inside:
            found[stage] = current
        if HEAD not in boundaries and all(boundary in found for boundary in inside):
            return found
        current = run(current)
    return found | {HEAD: current}
