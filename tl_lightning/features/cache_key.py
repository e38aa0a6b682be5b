"""What stored rows depend on: when any of it changes, they are others."""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from tl_lightning.backbones import Backbone
from tl_lightning.features.activations import prefix_of
from tl_lightning.images import read_content
from tl_lightning.utils import serialization
from tl_lightning.utils.hashing import fingerprint

FORMAT = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_CHUNK_BYTES = 1 << 20


class CacheKey(NamedTuple):
    """What the rows of a store depend on, beside the image: a difference in any field means other rows."""

    backbone: str
    """Class and arguments."""
    modules: str
    """SHA-256 of how the modules before the boundary describe themselves."""
    weights: str
    """SHA-256 of the parameters and buffers before the boundary."""
    preprocessing: str
    """What an image goes through, the background of transparent parts included."""
    augmentation: str
    """``none``, or what each view was drawn from."""
    boundary: str
    """First stage that is still to come; ``head`` for pooled features, ``map`` for the spatial map."""
    dtype: str
    """``float32``, ``float16`` or ``bfloat16``."""
    format: int = FORMAT
    """Version of the files."""

    @property
    def folder(self) -> str:
        """Name of the folder, another one for every other cache_key."""
        digest = hashlib.sha256(json.dumps(self._asdict(), sort_keys=True).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.]+", "_", f"{self.backbone.partition('(')[0]}-{self.boundary}")
        return f"{name}-{digest}"

    def differences(self, other: "CacheKey") -> list[str]:
        """Name the fields in which another cache_key differs, with both values."""
        pairs = zip(self._fields, self, other, strict=True)
        return [f"{name} is {_short(mine)} and was {_short(its)}" for name, mine, its in pairs if mine != its]


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def check_dtype(dtype: str) -> None:
    """Make sure that rows can be stored in a type.

    Raises:
        ValueError: They cannot.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; rows are stored as one of {', '.join(DTYPES)}")


def cache_key_of(
    backbone: Backbone, boundary: str, *, background: Sequence[int], augmentation: str = "none", dtype: str = "float32"
) -> CacheKey:
    """Describe the rows that a backbone makes of images, up to a boundary.

    Args:
        backbone: The network, with the weights that it has now.
        boundary: A stage, ``"head"`` or ``"map"``.
        background: What transparent parts of an image show: red, green and blue.
        augmentation: What views are drawn from.
        dtype: In which rows are stored.

    Raises:
        ValueError: There is no such stage or type.
    """
    check_dtype(dtype)
    prefix = prefix_of(backbone, boundary)
    tensors = dict(prefix.named_parameters()) | dict(prefix.named_buffers())
    # Which file the weights came from says nothing beyond the weights.
    arguments = {name: value for name, value in backbone.init_args[1].items() if name != "weights"}
    described = serialization.without_weights(serialization.to_config([list(backbone.init_args[0]), arguments]))
    return CacheKey(
        backbone=f"{type(backbone).__name__}({json.dumps(described, sort_keys=True)})",
        modules=hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(prefix)).encode()).hexdigest(),
        weights=fingerprint(dict(sorted(tensors.items()))),
        preprocessing=f"{tuple(backbone.preprocessing)} on background {tuple(background)}",
        augmentation=augmentation,
        boundary=boundary,
        dtype=dtype,
    )


def content_keys(paths: Sequence[Path]) -> list[str]:
    """Return the key of each image, by its file's bytes.

    Raises:
        ValueError: A file cannot be read; the message names it.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: content_key(read_content(path)), paths))


def content_key(content: bytes) -> str:
    """Return the key of an image by the bytes of its file, their SHA-256."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
