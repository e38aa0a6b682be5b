"""The images of a folder as rows of feature stores."""

import errno
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tl_lightning.backbones import Backbone
from tl_lightning.batch import UNLABELLED
from tl_lightning.data.image_folder import ImageFolderDataModule
from tl_lightning.data.image_loader import load_by_threads, load_in_order
from tl_lightning.data.splits import TRAIN
from tl_lightning.features import (
    CacheKey,
    FeatureRows,
    FeatureStore,
    cache_key_of,
    content_key,
    content_keys,
    extract,
    folder_for,
    like,
)
from tl_lightning.features.response import patterns
from tl_lightning.images import read_content, read_image
from tl_lightning.transforms import Preprocessing, eval_geometry, to_input
from tl_lightning.utils.distributed import all_gather_object, rank_and_world_size, synchronize_errors
from tl_lightning.utils.seeding import seeded

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class FeatureCache:
    """Find what is stored of the images of a folder, and compute what is not.

    A row is found by the content of the image's file, so an image that changes is computed again, alone, and one that is
    renamed or moved is not.

    Args:
        images: Where the images come from.
        cache_dir: Folder of the stores.
        dtype: In which rows are stored.
        views: Number of augmented views of each training image; 0 for the images as they are.
    """

    def __init__(self, images: ImageFolderDataModule, cache_dir: Path, dtype: str, views: int) -> None:
        self.images = images
        self.cache_dir = cache_dir
        self.dtype = dtype
        self.views = views
        self._keys: dict[str, str] = {}
        self._stores: dict[CacheKey, FeatureStore] = {}

    def forget(self) -> None:
        """Look at the files again the next time."""
        self._keys, self._stores = {}, {}

    def complete(self, network: Backbone, boundaries: Sequence[str]) -> None:
        """Compute and store what is not stored yet, in one pass over the images for all boundaries; on all ranks.

        What is stored is checked, for it may be needed only after hours of training.

        Args:
            network: The backbone, where it shall run.
            boundaries: At which its activations are stored.

        Raises:
            OSError: There is too little space, or nothing can be written there.
            DamagedStoreError: A shard is not what was written.
            ValueError: An image cannot be read, or an activation does not fit into the type.
        """
        splits = self.images.splits
        training = set(splits[TRAIN].files) if TRAIN in splits and self.views else set()
        keys = self._content()
        plain = _by_key((key, file) for file, key in keys.items() if file not in training)
        drawn = _by_key(
            (f"{key}:{view}", f"{file} (view {view})")
            for view in range(self.views)
            for file, key in keys.items()
            if file in training
        )
        for names, augmented in ((plain, False), (drawn, True)):
            if not names:
                continue
            try:
                stores = [self._store(network, boundary, augmented) for boundary in boundaries]
                self._extract(network, stores, names, augmented)
            except OSError as error:
                if error.errno in _NO_ROOM or _is_in(error.filename, self.cache_dir):
                    raise OSError(
                        f"features cannot be stored in {str(self.cache_dir)!r} ({error.strerror or error}): give another "
                        "cache_dir, a folder that can be written to"
                    ) from error
                raise
            rank, world = rank_and_world_size()
            with synchronize_errors():
                for store in stores:
                    store.check(list(names), share=slice(rank, None, world))

    def rows(
        self, network: Backbone, boundary: str, files: Sequence[str], view: int | None, device: torch.device
    ) -> FeatureRows:
        """Return rows for reading; what weights that were loaded meanwhile make of images is computed first.

        Args:
            network: The backbone, with the weights that it has now.
            boundary: Whose activations are wanted.
            files: The images.
            view: Number of the augmented view; None for the images as they are.
            device: Where rows are wanted.
        """
        store = self._store(network, boundary, augmented=view is not None)
        contents = self._content()
        keys = [contents[file] if view is None else f"{contents[file]}:{view}" for file in files]
        if any(key not in store for key in keys):
            self.complete(network, [boundary])
            store.reload()
        return FeatureRows(store, keys, device)

    def _content(self) -> dict[str, str]:
        """Return the key of each labelled image by its path, in the order of the paths."""
        if not self._keys:
            files = sorted(file for samples in self.images.splits.values() for file in samples.files)
            rank, world = rank_and_world_size()
            with synchronize_errors():
                found = content_keys([self.images.root / file for file in files[rank::world]])
            for first, share in enumerate(all_gather_object(found)):
                self._keys |= dict(zip(files[first::world], share, strict=True))
            self._keys = dict(sorted(self._keys.items()))
        return self._keys

    def _store(self, network: Backbone, boundary: str, augmented: bool) -> FeatureStore:
        augmentation = "none"
        if augmented:
            augmentation = _describe(self.images.augmentation(network.preprocessing), self.images.seed)
        cache_key = cache_key_of(
            network, boundary, background=self.images.background, augmentation=augmentation, dtype=self.dtype
        )
        if cache_key in self._stores:
            self._stores[cache_key].reload()
        else:
            self._stores[cache_key] = FeatureStore(folder_for(self.cache_dir, network, cache_key), cache_key)
        return self._stores[cache_key]

    def _extract(
        self, network: Backbone, stores: Sequence[FeatureStore], names: dict[str, str], augmented: bool
    ) -> None:
        images = _Images(self.images, {key: file for file, key in self._content().items()}, network.preprocessing)
        device = like(network).device
        finish = to_input(network.preprocessing)

        def load(keys: Sequence[Sequence[str]]) -> Iterator[Tensor]:
            by_threads = device.type == "cpu" and not augmented  # augmentation draws from generators that threads share
            loaded = load_by_threads(images, keys) if by_threads else load_in_order(images, keys, self.images.workers)
            for batch in loaded:
                here = batch.to(device)
                yield here if here.is_floating_point() else finish(here)

        extract(network, stores, names, load, say=_say)


class _Images(Dataset[tuple[Tensor, int, int]]):
    """Images by the keys of their rows: prepared, or, without augmentation, uint8 still, a quarter of the bytes."""

    def __init__(self, images: ImageFolderDataModule, files: dict[str, str], preprocessing: Preprocessing) -> None:
        self.root, self.background, self.seed = images.root, images.background, images.seed
        self.files = files
        self.plain = eval_geometry(preprocessing)
        self.augment = images.augmentation(preprocessing)

    def __getitem__(self, key: str) -> tuple[Tensor, int, int]:
        content, _, view = key.partition(":")
        path = self.root / self.files[content]
        data = read_content(path)
        if content_key(data) != content:
            raise ValueError(f"the image {str(path)!r} changed while features were computed; run again")
        image = read_image(path, self.background, data)
        if not view:
            return self.plain(image), UNLABELLED, 0
        with seeded(self.seed, "augmentation", int(view), content):
            return self.augment(image), UNLABELLED, 0


def _say(text: str) -> None:
    # A file's name may hold bytes that are no text.
    print(f"features: {text.encode(errors='backslashreplace').decode()}", flush=True)


def _describe(transform: Callable[[Tensor], Tensor], seed: int) -> str:
    """Describe an augmentation by what it says of itself, and by what it makes of test patterns.

    Raises:
        ValueError: It draws from something that no seed is for.
    """
    images = ((patterns(96, 128) + 2) * 63).clamp(0, 255).to(torch.uint8)
    digests = []
    for _ in range(2):
        digest = hashlib.sha256()
        for number, image in enumerate(images):
            with seeded(seed, "augmentation", "pattern", number):
                digest.update(transform(image).contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    if digests[0] != digests[1]:
        raise ValueError(
            "the augmentation of the training images is another one each time, though drawn from the same seed, so views of it "
            "cannot be stored: draw by torch, numpy or random, from their global generators"
        )
    said = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(transform).split()))
    return f"{said} from seed {seed}, which makes {digests[0]} of test patterns"


def _is_in(path: object, folder: Path) -> bool:
    """Return whether a path that an error names is in a folder, or is one on the way to it."""
    if not isinstance(path, str):
        return False
    found, place = Path(path).absolute(), folder.absolute()
    return found.is_relative_to(place) or place.is_relative_to(found)


def _by_key(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the names by key; images of equal content are one, under the first of their names."""
    found: dict[str, str] = {}
    for key, name in pairs:
        found.setdefault(key, name)
    return found
