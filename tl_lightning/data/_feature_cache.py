"""Find and compute the cached features of a folder of images."""

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
from tl_lightning.data.image_loader import load_with_threads, load_with_workers
from tl_lightning.data.splits import TRAIN
from tl_lightning.features import (
    CacheKey,
    FeatureRows,
    FeatureStore,
    cache_key_of,
    check_ranks,
    content_key,
    content_keys,
    extract,
    patterns,
    reference_tensor,
)
from tl_lightning.images import ImageError, read_content, read_image
from tl_lightning.transforms import Preprocessing, normalize_transform, resize_crop_transform
from tl_lightning.utils.distributed import all_gather_object, raise_on_all_ranks, rank_and_world_size
from tl_lightning.utils.seeding import seeded

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class FeatureCache:
    """Find the cached features of a folder of images, and compute the missing ones.

    A row is found by the content of the image's file. An image that changes is therefore computed again, alone, and an
    image that is renamed or moved is not.

    Args:
        images: The data module of the images.
        cache_dir: Folder of the stores.
        dtype: The dtype of the cached rows.
        views: Number of augmented views of each training image; 0 for the images without augmentation.
    """

    def __init__(self, images: ImageFolderDataModule, cache_dir: Path, dtype: str, views: int) -> None:
        self.images = images
        self.cache_dir = cache_dir
        self.dtype = dtype
        self.views = views
        self._content_keys: dict[str, str] = {}
        self._stores: dict[CacheKey, FeatureStore] = {}

    def forget(self) -> None:
        """Read the images' files and the stores again at the next use."""
        self._content_keys, self._stores = {}, {}

    def complete(self, network: Backbone, boundaries: Sequence[str]) -> None:
        """Compute and store missing rows, in one pass over the images for all boundaries; call it on all ranks.

        All rows are verified, including those of splits that are read only after hours of training.

        Args:
            network: The backbone, on its device.
            boundaries: The boundaries whose activations are cached.

        Raises:
            OSError: The disk has too little space, or the cache folder cannot be written to.
            StaleStoreError: The ranks would compute different rows.
            DamagedStoreError: A shard differs from the one that was written.
            ValueError: An image cannot be read, an activation does not fit the dtype, or the activations of an image
                depend on chance or on its batch.
        """
        splits = self.images.splits
        viewed = set(splits[TRAIN].files) if TRAIN in splits and self.views else set()
        keys = self._keys_by_file()
        plain_names = _first_names((key, file) for file, key in keys.items() if file not in viewed)
        view_names = _first_names(
            (f"{key}:{view}", f"{file} (view {view})")
            for view in range(self.views)
            for file, key in keys.items()
            if file in viewed
        )
        for names, augmented in ((plain_names, False), (view_names, True)):
            if not names:
                continue
            try:
                stores = [self._store(network, boundary, augmented) for boundary in boundaries]
                self._extract(network, stores, names, augmented)
            except OSError as error:
                if error.errno in _CANNOT_WRITE or _lies_within(error.filename, self.cache_dir):
                    raise OSError(
                        f"features cannot be cached in {str(self.cache_dir)!r} ({error.strerror or error}): give "
                        "another cache_dir, a folder that can be written to"
                    ) from error
                raise
            rank, world = rank_and_world_size()
            with raise_on_all_ranks():
                for store in stores:
                    store.check(list(names), share=slice(rank, None, world))

    def rows(
        self, network: Backbone, boundary: str, files: Sequence[str], view: int | None, device: torch.device
    ) -> FeatureRows:
        """Return cached rows; compute them first if they are missing, as after loading other weights.

        Args:
            network: The backbone, with its present weights.
            boundary: The boundary of the activations.
            files: The images.
            view: Number of the augmented view; None for the images without augmentation.
            device: The device that rows are returned on.
        """
        store = self._store(network, boundary, augmented=view is not None)
        by_file = self._keys_by_file()
        keys = [by_file[file] if view is None else f"{by_file[file]}:{view}" for file in files]
        if any(key not in store for key in keys):
            self.complete(network, [boundary])
            store.reload()
        return FeatureRows(store, keys, device)

    def _keys_by_file(self) -> dict[str, str]:
        """Return the content key of each labelled image by its path, in the order of the paths."""
        if not self._content_keys:
            files = sorted(file for samples in self.images.splits.values() for file in samples.files)
            rank, world = rank_and_world_size()
            with raise_on_all_ranks():
                found = content_keys([self.images.root / file for file in files[rank::world]])
            for first, share in enumerate(all_gather_object(found)):
                self._content_keys |= dict(zip(files[first::world], share, strict=True))
            self._content_keys = dict(sorted(self._content_keys.items()))
        return self._content_keys

    def _store(self, network: Backbone, boundary: str, augmented: bool) -> FeatureStore:
        augmentation = "none"
        if augmented:
            augmentation = _describe_augmentation(self.images.augmentation(network.preprocessing), self.images.seed)
        cache_key = cache_key_of(
            network, boundary, background=self.images.background, augmentation=augmentation, dtype=self.dtype
        )
        check_ranks([cache_key])  # ranks with different keys would wait for each other in different places
        if cache_key in self._stores:
            self._stores[cache_key].reload()
        else:
            self._stores[cache_key] = FeatureStore(self.cache_dir / cache_key.folder, cache_key)
        return self._stores[cache_key]

    def _extract(
        self, network: Backbone, stores: Sequence[FeatureStore], names: dict[str, str], augmented: bool
    ) -> None:
        images = _KeyedImages(
            self.images, {key: file for file, key in self._keys_by_file().items()}, network.preprocessing
        )
        device = reference_tensor(network).device
        finish = normalize_transform(network.preprocessing)

        def load(keys: Sequence[Sequence[str]]) -> Iterator[Tensor]:
            by_threads = device.type == "cpu" and not augmented  # augmentation draws from generators that threads share
            loaded = (
                load_with_threads(images, keys)
                if by_threads
                else load_with_workers(images, keys, self.images.effective_num_workers)
            )
            for batch in loaded:
                on_device = batch.to(device)
                yield on_device if on_device.is_floating_point() else finish(on_device)

        extract(network, stores, names, load, log=_print)


class _KeyedImages(Dataset[tuple[Tensor, int, int]]):
    """Images by the key of their row: augmented views as float, other images as uint8, a quarter of the bytes."""

    def __init__(self, images: ImageFolderDataModule, files: dict[str, str], preprocessing: Preprocessing) -> None:
        self.root, self.background, self.seed = images.root, images.background, images.seed
        self.files = files
        self.plain = resize_crop_transform(preprocessing)
        self.augment = images.augmentation(preprocessing)

    def __getitem__(self, key: str) -> tuple[Tensor, int, int]:
        content, _, view = key.partition(":")
        path = self.root / self.files[content]
        data = read_content(path)
        if content_key(data) != content:
            raise ImageError(f"the image {str(path)!r} changed while features were computed; run again")
        image = read_image(path, self.background, data)
        if not view:
            return self.plain(image), UNLABELLED, 0
        with seeded(self.seed, "augmentation", int(view), content):
            return self.augment(image), UNLABELLED, 0


def _print(text: str) -> None:
    # The name of a file may hold bytes that are not valid text.
    print(f"features: {text.encode(errors='backslashreplace').decode()}", flush=True)


def _describe_augmentation(transform: Callable[[Tensor], Tensor], seed: int) -> str:
    """Describe an augmentation by its ``repr`` and by the views that it makes of test images.

    Raises:
        ValueError: It draws from a generator that the seed does not reach.
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
            "the augmentation of the training images makes different views from the same seed, so its views cannot be "
            "cached: draw random numbers by torch, numpy or random, from their global generators"
        )
    described = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(transform).split()))
    return f"{described} from seed {seed}; SHA-256 of the views of test images: {digests[0]}"


def _lies_within(path: object, folder: Path) -> bool:
    """Return whether a path that an error names lies in a folder, or is one of the folder's parents."""
    if not isinstance(path, str):
        return False
    found, place = Path(path).absolute(), folder.absolute()
    return found.is_relative_to(place) or place.is_relative_to(found)


def _first_names(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return names by key; images of equal content share a row, under the first of their names."""
    found: dict[str, str] = {}
    for key, name in pairs:
        found.setdefault(key, name)
    return found
