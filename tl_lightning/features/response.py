"""How a network responds to a fixed input: by that other code is noticed, be it the network's own or a library's."""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from tl_lightning.backbones import Backbone
from tl_lightning.features.activations import activations
from tl_lightning.freezing import as_frozen, evaluating

Response = tuple[float, ...]
"""The norm of a row, and its projections onto a few fixed directions."""

_DIRECTIONS = 8
_TOLERANCE = 1e-5  # of the norm: what rounding in single precision does, and hardly any other code
_STEP = 0.7548776662466927  # the fractions of its multiples fill an interval evenly, in no order that one would see


def like(network: nn.Module) -> Tensor:
    """Return a tensor of the type, and on the device, in which a network computes."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def pattern_rows(backbone: Backbone, boundaries: Collection[str]) -> dict[str, Tensor]:
    """Compute the rows (1, ...) of a test pattern, by boundary."""
    here = like(backbone)
    shape = torch.Size((1, 3, *backbone.preprocessing.crop_shape))
    pattern = (torch.arange(1, shape.numel() + 1, dtype=torch.float64) * _STEP).frac() * 4 - 2
    with torch.inference_mode(), as_frozen(here.device.type), evaluating(backbone):
        return activations(backbone, pattern.view(shape).to(here), boundaries)


def response_of(rows: Tensor) -> Response:
    """Sum up the row (1, ...) of the test pattern in a few numbers."""
    row = rows.to("cpu", torch.float64).flatten()
    places = torch.arange(1, row.numel() + 1, dtype=torch.float64)
    waves = (torch.cos(places * (_STEP * number)) for number in range(1, _DIRECTIONS + 1))
    return (float(row.norm()), *(float(row @ wave) for wave in waves))


def is_same(response: Response, other: Response) -> bool:
    """Return whether two responses differ by no more than rounding."""
    first, second = torch.tensor(response), torch.tensor(other)
    if len(first) != len(second):
        return False
    scale = float(first[0].nan_to_num())
    return torch.allclose(first, second, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True)
