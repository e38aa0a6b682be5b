"""Identify cached features by everything that they are computed from."""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from tl_lightning.backbones import Backbone
from tl_lightning.features._source_code import code_digest
from tl_lightning.features.activations import prefix_of
from tl_lightning.images import read_content
from tl_lightning.utils import serialization
from tl_lightning.utils.hashing import fingerprint

FORMAT = 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


class CacheKey(NamedTuple):
    """Everything beside the image that a cached row depends on: keys that differ in any field have separate stores."""

    backbone: str
    """Class and arguments of the backbone."""
    modules: str
    """SHA-256 of the ``repr`` of the modules before the boundary."""
    code: str
    """SHA-256 of the classes of the backbone and of its modules, without those of the three libraries below."""
    torch: str
    """Version of torch."""
    torchvision: str
    """Version of torchvision."""
    timm: str
    """Version of timm."""
    weights: str
    """SHA-256 of the parameters and buffers before the boundary."""
    preprocessing: str
    """Preprocessing of the images, and the background of transparent ones."""
    augmentation: str
    """``none``, or the random transform and the seed of the augmented views."""
    boundary: str
    """The first stage that is not run; ``head`` for pooled features, ``map`` for the spatial map."""
    dtype: str
    """``float32``, ``float16`` or ``bfloat16``."""
    format: int = FORMAT
    """Version of the files' format."""

    @property
    def folder(self) -> str:
        """Name of the folder of the store, unique to this key."""
        digest = hashlib.sha256(json.dumps(self._asdict(), sort_keys=True).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.]+", "_", f"{self.backbone.partition('(')[0]}-{self.boundary}")
        return f"{name}-{digest}"

    def differences(self, other: "CacheKey", verb: str = "was") -> list[str]:
        """Name the fields in which another key differs, with both values; ``verb`` introduces the other one's."""
        pairs = zip(self._fields, self, other, strict=True)
        return [f"{name} is {_short(mine)} and {verb} {_short(its)}" for name, mine, its in pairs if mine != its]


def _short(value: object) -> str:
    return _DIGEST.sub(r"\1...", str(value))


def check_dtype(dtype: str) -> None:
    """Make sure that rows can be cached in a dtype.

    Raises:
        ValueError: The dtype is not one of :data:`DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; features are cached as one of {', '.join(DTYPES)}")


def cache_key_of(
    backbone: Backbone, boundary: str, *, background: Sequence[int], augmentation: str = "none", dtype: str = "float32"
) -> CacheKey:
    """Make the cache key of a backbone's activations at a boundary.

    Args:
        backbone: The network, with its present weights.
        boundary: A stage, ``"head"`` or ``"map"``.
        background: Red, green and blue behind the transparent parts of an image.
        augmentation: Description of the random transform and the seed of augmented views.
        dtype: The dtype of the cached rows.

    Raises:
        ValueError: The backbone has no such stage or is sharded, or the dtype is unknown.
    """
    check_dtype(dtype)
    if any(isinstance(parameter, DTensor) for parameter in backbone.parameters()):
        raise ValueError(
            "the backbone is sharded over the processes, so none of them can compute features with it alone: use "
            "strategy 'ddp', or train on the images themselves, without CachedFeaturesDataModule"
        )
    prefix = prefix_of(backbone, boundary)
    tensors = dict(prefix.named_parameters()) | dict(prefix.named_buffers())
    # The file that the weights came from says nothing beyond the weights.
    arguments = {name: value for name, value in backbone.init_args[1].items() if name != "weights"}
    described = serialization.without_weights(serialization.to_config([list(backbone.init_args[0]), arguments]))
    return CacheKey(
        backbone=f"{type(backbone).__name__}({json.dumps(described, sort_keys=True)})",
        modules=hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(prefix)).encode()).hexdigest(),
        code=code_digest(backbone),
        torch=metadata.version("torch"),
        torchvision=metadata.version("torchvision"),
        timm=metadata.version("timm"),
        weights=fingerprint(dict(sorted(tensors.items()))),
        preprocessing=f"{tuple(backbone.preprocessing)} on background {tuple(background)}",
        augmentation=augmentation,
        boundary=boundary,
        dtype=dtype,
    )


def content_keys(paths: Sequence[Path]) -> list[str]:
    """Return the content key of each image file.

    Raises:
        ValueError: A file cannot be read; the message names it.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: content_key(read_content(path)), paths))


def content_key(content: bytes) -> str:
    """Return the SHA-256 of an image file's bytes, by which its row is found."""
    return hashlib.sha256(content).hexdigest()
