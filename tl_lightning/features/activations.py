"""What a backbone makes of images at its boundaries."""

from collections.abc import Collection

from torch import Tensor, nn

from tl_lightning.backbones import Backbone, Segment, stages_of
from tl_lightning.freezing import HEAD, MAP
from tl_lightning.utils.messages import unknown


def prefix_of(backbone: Backbone, boundary: str) -> nn.Module:
    """Return the part of a backbone before a boundary; all of it for ``"head"`` and ``"map"``.

    Raises:
        ValueError: There is no such stage.
    """
    if boundary in (HEAD, MAP):
        return backbone
    if boundary not in backbone.stages:
        raise ValueError(unknown("boundary", boundary, [*backbone.stages, MAP, HEAD]))
    return backbone.split(boundary)[0]


def activations(backbone: Backbone, images: Tensor, boundaries: Collection[str]) -> dict[str, Tensor]:
    """Compute what comes out before each boundary, in one pass where the backbone allows it.

    Args:
        backbone: The network, in eval mode.
        images: (N, 3, H, W).
        boundaries: Stages, ``"head"`` for the pooled features, ``"map"`` for the spatial map.

    Returns:
        (N, ...) by boundary.

    Raises:
        ValueError: There is no such stage.
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
