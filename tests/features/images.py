"""Extract a folder of images without Lightning."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.doubles import TinyBackbone
from tl_lightning.backbones import Backbone
from tl_lightning.features import FeatureStore, cache_key_of, content_keys, extract
from tl_lightning.features.extraction import ExtractionStats
from tl_lightning.images import read_image
from tl_lightning.transforms import eval_transform


def names_in(root: Path) -> dict[str, str]:
    """Return the content key of each image below a folder, with its path."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return dict(zip(content_keys([root / file for file in files]), files, strict=True))


def store(cache: Path, backbone: Backbone, boundary: str = "head", dtype: str = "float32") -> FeatureStore:
    cache_key = cache_key_of(backbone, boundary, background=(255, 255, 255), dtype=dtype)
    return FeatureStore(cache / cache_key.folder, cache_key)


def fill(
    root: Path, stores: Sequence[FeatureStore], backbone: Backbone | None = None, seen: list[str] | None = None
) -> ExtractionStats:
    """Extract a folder into stores; ``seen`` collects the files that were read."""
    backbone = TinyBackbone() if backbone is None else backbone
    names = names_in(root)
    transform = eval_transform(backbone.preprocessing)

    def load(batches: Sequence[Sequence[str]]) -> Iterator[Tensor]:
        for keys in batches:
            if seen is not None:
                seen.extend(names[key] for key in keys)
            yield torch.stack([transform(read_image(root / names[key])) for key in keys])

    return extract(backbone, stores, names, load)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a store."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
