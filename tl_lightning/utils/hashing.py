"""Hashes of tensors: whether two are the same, bit for bit."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of each tensor, with its type and shape; of this rank's shard where it is sharded."""
    found = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        raw = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + raw.tobytes()).hexdigest()
    return found


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, with their names, types and shapes: of a ``state_dict()``, for one."""
    each = fingerprints(tensors)
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in each.items()).encode()).hexdigest()
