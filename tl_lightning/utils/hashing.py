"""Hash tensors, to compare them bit for bit."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of each tensor, with its dtype and shape; of a sharded tensor, hash the shard of this rank."""
    digests = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        raw = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw.data)  # without a copy of the bytes
        digests[name] = digest.hexdigest()
    return digests


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return one SHA-256 of tensors, with their names, dtypes and shapes; for example of a ``state_dict()``."""
    digests = fingerprints(tensors)
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in digests.items()).encode()).hexdigest()
