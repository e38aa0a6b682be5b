"""The only writer of ``requires_grad`` and of a part's train or eval mode."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def freeze(module: nn.Module) -> None:
    """Stop a part from moving: no gradients, none left over, and eval mode for batch norm, dropout and the like."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer skips it; zeros would still be decayed and carried by momentum
    module.eval()


def hold(frozen: Iterable[nn.Module]) -> None:
    """Put frozen parts back into eval mode, whoever took them out of it."""
    for part in frozen:
        for module in part.modules():
            module.training = False


@contextmanager
def as_frozen(device_type: str) -> Iterator[None]:
    """Run a frozen part the same way in every place: without an autograd graph and in its own precision.

    Mixed precision is off inside, so that training, prediction and extraction see the same features: pre-trained
    networks can lose much of them in bfloat16.

    Args:
        device_type: Where it runs, as ``"cuda"``.
    """
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous()
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
