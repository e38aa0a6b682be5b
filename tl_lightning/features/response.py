"""How a network responds to fixed inputs: by that other code is noticed, be it the network's own or a library's.

Code that none of the inputs reaches is not: of the 30 places where EfficientNet-Lite0 caps activations at 6 after its first
stage, they reach 28, and photographs reach one of the other two often.
"""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tl_lightning.backbones import Backbone
from tl_lightning.features.activations import activations
from tl_lightning.freezing import HEAD, MAP, as_frozen, evaluating

Response = tuple[tuple[float, ...], ...]
"""For each test pattern, the norm of its row, and the projections of the row onto a few fixed directions."""

_DIRECTIONS = 8
_TOLERANCE = 1e-5  # of the norm: what rounding in single precision does, and hardly any other code
_STEADY = 1e-2  # of the norm: what other kernels may do to an image that is alone, in whatever precision
_STEP = 0.7548776662466927  # the fractions of its multiples fill an interval evenly, in no order that one would see


def like(network: nn.Module) -> Tensor:
    """Return a tensor of the type, and on the device, in which a network computes."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def patterns(height: int, width: int) -> Tensor:
    """Return the test patterns (4, 3, H, W): noise as of an image, noise far beyond one, waves, and a bright area."""
    number = torch.arange(1, 3 * height * width + 1, dtype=torch.float64)
    noise = (number * _STEP).frac().view(3, height, width) * 2 - 1
    rows, columns = torch.arange(height).view(-1, 1) / height, torch.arange(width) / width
    waves = torch.stack([torch.sin(6 * rows + (2 + 3 * channel) * columns) for channel in range(3)])
    return torch.stack([2 * noise, 10 * noise, 3 * waves + 0.5 * noise, 2.6 + 0.1 * noise + 0 * waves])


def pattern_rows(backbone: Backbone, boundaries: Collection[str], *, together: bool = True) -> dict[str, Tensor]:
    """Compute the rows (4, ...) of the test patterns, by boundary: in one batch, or each alone.

    The backbone's convolutions get the memory layout that a classifier gives them.

    Raises:
        ValueError: The backbone is sharded.
    """
    if any(isinstance(parameter, DTensor) for parameter in backbone.parameters()):
        raise ValueError(
            "what may train of the backbone is sharded over the processes, so nothing can be computed with it alone, and stored: use "
            "strategy 'ddp', or train on the images themselves"
        )
    backbone.to(memory_format=torch.channels_last)  # in another layout, these would be other bits under the same name
    here = like(backbone)
    images = patterns(*backbone.preprocessing.crop_shape).to(here)
    with torch.inference_mode(), as_frozen(here.device.type), evaluating(backbone):
        batches = [
            activations(backbone, batch, boundaries) for batch in torch.split(images, len(images) if together else 1)
        ]
    return {boundary: torch.cat([made[boundary] for made in batches]) for boundary in boundaries}


def response_of(rows: Tensor) -> Response:
    """Sum up the rows (4, ...) of the test patterns in a few numbers each."""
    flat = rows.to("cpu", torch.float64).flatten(1)
    places = torch.arange(1, flat.shape[1] + 1, dtype=torch.float64)
    waves = (torch.cos(places * (_STEP * number)) for number in range(1, _DIRECTIONS + 1))
    found = torch.stack([flat.norm(dim=1), *(flat @ wave for wave in waves)], dim=1)
    return tuple(tuple(row) for row in found.tolist())


def is_same(response: Response, other: Response, tolerance: float = _TOLERANCE) -> bool:
    """Return whether two responses differ by no more than rounding."""
    if [len(row) for row in response] != [len(row) for row in other]:
        return False
    first, second = torch.tensor(response, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    allowed = tolerance * first[:, :1].nan_to_num()
    return bool((((first - second).abs() <= allowed) | (first == second) | (first.isnan() & second.isnan())).all())


def check_steady(backbone: Backbone, boundary: str, response: Response) -> None:
    """Make sure that what a network makes of an image depends on the image alone.

    Args:
        backbone: The network.
        boundary: Of the rows.
        response: To the patterns in one batch.

    Raises:
        ValueError: It depends on chance, or on what is beside the image in a batch; or what the network makes of an image is
            not what its stages make of it.
    """
    if boundary not in (HEAD, MAP):
        parts, whole = (pattern_rows(backbone, names)[HEAD] for names in ([boundary, HEAD], [HEAD]))
        if not is_same(response_of(parts), response_of(whole), _STEADY):
            raise ValueError(
                f"{type(backbone).__name__} makes other features of an image than its stages do, one after the other, so what comes "
                f"before {boundary!r} cannot be stored: its forward does more than they do. Let split do that too"
            )
    again, alone = (response_of(pattern_rows(backbone, [boundary], together=t)[boundary]) for t in (True, False))
    if not (is_same(response, again) and is_same(response, alone, _STEADY)):
        raise ValueError(
            f"what {type(backbone).__name__} makes of an image is not the same each time, even in eval mode: it depends on chance, or "
            "on the other images of the batch, so it cannot be stored. Train on the images themselves, without "
            "CachedFeaturesDataModule"
        )
