"""Compute the rows that stores lack: each rank its share, in whole shards."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tl_lightning.backbones import Backbone
from tl_lightning.features._disk_space import check_space
from tl_lightning.features._manifest import Block, Layout, StaleStoreError, claim, read_response
from tl_lightning.features._messages import describe, describe_plan
from tl_lightning.features.activations import activations
from tl_lightning.features.cache_key import CacheKey
from tl_lightning.features.response import Response, check_steady, is_same, like, pattern_rows, response_of
from tl_lightning.features.store import FeatureStore
from tl_lightning.freezing import as_frozen, evaluating
from tl_lightning.utils.distributed import (
    all_gather_object,
    broadcast_object,
    locked,
    rank_and_world_size,
    synchronize_errors,
)
from tl_lightning.utils.memory import keep_freed_memory

BATCH = 32
"""Images that go through the network together, always as many: kernels compute in another order for other sizes."""

Load = Callable[[Sequence[Sequence[str]]], Iterable[torch.Tensor]]
"""From the keys of each batch to the images (n, 3, H, W) of each batch, in the same order."""


def folder_for(cache_dir: str | Path, backbone: Backbone, cache_key: CacheKey) -> Path:
    """Return the folder of a store, and keep it: where code has changed, a cache_key has several, of which this code has one.

    On several ranks, the first one chooses.

    Args:
        cache_dir: Folder of the stores.
        backbone: The network, with the weights that it has now.
        cache_key: What :func:`cache_key_of` has made of it.

    Raises:
        DamagedStoreError: A file of a store cannot be read.
        OSError: Nothing can be written there.
        StaleStoreError: The ranks would make other rows.
        ValueError: What the network makes of an image does not depend on the image alone.
    """
    chosen = None
    with synchronize_errors():
        response = response_of(pattern_rows(backbone, [cache_key.boundary])[cache_key.boundary])
    _check_ranks([(cache_key, response)])
    with synchronize_errors():
        if rank_and_world_size()[0] == 0:
            chosen = _choose(Path(cache_dir), backbone, cache_key, response)
    return Path(cache_dir) / str(broadcast_object(chosen))


def _choose(cache_dir: Path, backbone: Backbone, cache_key: CacheKey, response: Response) -> str:
    name, number = cache_key.folder, 1
    while True:
        if read_response(cache_dir / name) is None:
            check_steady(backbone, cache_key.boundary, response)
        if claim(cache_dir / name, response):
            return name
        number += 1
        name = f"{cache_key.folder}-{number}"


def _check_ranks(mine: list[tuple[CacheKey, Response]]) -> None:
    """Make sure that all ranks compute the same, before any of them writes a row."""
    first, *others = all_gather_object(mine)
    for rank, other in enumerate(others, 1):
        for (cache_key, response), (its, its_response) in zip(first, other, strict=True):
            if its != cache_key or not is_same(response, its_response):
                what = "; ".join(cache_key.differences(its)) or "the network has other code"
                raise StaleStoreError(
                    f"rank {rank} would compute other features than rank 0 ({what}): start all processes "
                    "with the same code, weights and options"
                )


class ExtractionStats(NamedTuple):
    """What an extraction did, on all ranks."""

    rows: int
    """Images, or views of images, that went through the network."""
    seconds: float
    error: float
    """Largest error of a shard by its type, the norm of the difference over the norm; 0 for float32."""


def extract(
    backbone: Backbone,
    stores: Sequence[FeatureStore],
    names: Mapping[str, str],
    load: Load,
    *,
    say: Callable[[str], object] | None = None,
) -> ExtractionStats:
    """Compute what stores lack, in one pass over the images for all boundaries, and write it.

    What is complete already is not computed again, so an extraction that was stopped goes on. On several ranks, all call
    this, each computes whole shards, and they come back when all are done.

    Args:
        backbone: The network, where it shall run. Its convolutions get the memory layout that a classifier gives them.
        stores: Of this backbone, at its boundaries.
        names: Of the rows wanted, by key: the order in which new ones are computed.
        load: Loads images.
        say: Takes what is to be said, on the first rank, where a bar is drawn then; None keeps silent.

    Raises:
        OSError: There is too little space.
        ValueError: An image cannot be read, or an activation does not fit into the store's type.
        StaleStoreError: A store holds rows that other code made, see :func:`folder_for`; or the ranks would make other rows.
        RuntimeError: Another rank failed, or sees another folder.
    """
    begin = time.monotonic()
    rank, world = rank_and_world_size()
    if rank != 0:
        say = None
    with synchronize_errors():
        pattern = pattern_rows(backbone, [store.cache_key.boundary for store in stores])
        responses = {boundary: response_of(rows) for boundary, rows in pattern.items()}
    _check_ranks([(store.cache_key, responses[store.cache_key.boundary]) for store in stores])
    if broadcast_object(all(_is_complete(store, names, responses) for store in stores)):
        return ExtractionStats(0, 0.0, 0.0)
    layouts = {boundary: Layout.of(rows) for boundary, rows in pattern.items()}
    stores = sorted(stores, key=lambda store: store.folder)
    if like(backbone).device.type == "cpu":
        keep_freed_memory()
    error = 0.0
    with locked([store.lock for store in stores], f"computing features in {stores[0].folder}"):
        with synchronize_errors():
            for store in stores:
                store.reload()
                if rank == 0:
                    store.claim(responses[store.cache_key.boundary])
        plans, missing = broadcast_object(_plan(stores, names))
        blocks = list(dict.fromkeys(block for gaps in missing for block in gaps))
        with synchronize_errors():
            for store, gaps in zip(stores, missing, strict=True):
                rows = sum(len(block.names) for block in gaps)
                check_space(store, layouts[store.cache_key.boundary], rows)
                if say is not None and rows:
                    seconds = partial(_seconds, backbone, store.cache_key.boundary)
                    say(describe_plan(store, layouts[store.cache_key.boundary], rows, names, seconds))
            error = _compute(backbone, stores, missing, blocks[rank::world], layouts, load, say is not None)
        with synchronize_errors():
            for store, plan, gaps in zip(stores, plans, missing, strict=True):
                if rank == 0:
                    store.finish(plan, gaps, layouts[store.cache_key.boundary])
        with synchronize_errors():
            for store in stores:
                store.reload()
            if not all(_is_complete(store, names, responses) for store in stores):
                raise RuntimeError(
                    f"the features that were just written to {str(stores[0].folder)!r} are not there for rank {rank}: give a "
                    "cache_dir that all machines share"
                )
    done = ExtractionStats(
        sum(len(block.names) for block in blocks), time.monotonic() - begin, max(all_gather_object(error))
    )
    if say is not None and done.rows:
        say(describe(done.rows, done.seconds, done.error, stores[0].cache_key.dtype))
    return done


def _is_complete(store: FeatureStore, names: Mapping[str, str], responses: Mapping[str, Response]) -> bool:
    if not store.fits(responses[store.cache_key.boundary]):
        return False
    return store.plan(names) == list(store.blocks) and all(store.is_written(block) for block in store.blocks)


def _plan(stores: Sequence[FeatureStore], names: Mapping[str, str]) -> tuple[list[list[Block]], list[list[Block]]]:
    """Return the blocks that each store will have, and those of them that are not there yet."""
    plans = [store.plan(names) for store in stores]
    return plans, [[b for b in plan if not store.is_written(b)] for store, plan in zip(stores, plans, strict=True)]


def _seconds(backbone: Backbone, boundary: str) -> float:
    """Return how long the network takes for an image, from the faster of two batches."""
    here = like(backbone)
    times = []
    with torch.inference_mode(), as_frozen(here.device.type), evaluating(backbone):
        images = here.new_zeros(BATCH, 3, *backbone.preprocessing.crop_shape)
        for _ in range(2):
            begin = time.monotonic()
            activations(backbone, images, [boundary])[boundary].sum().item()  # waits for the device
            times.append(time.monotonic() - begin)
    return min(times) / BATCH


def _compute(
    backbone: Backbone,
    stores: Sequence[FeatureStore],
    missing: Sequence[Sequence[Block]],
    blocks: Sequence[Block],
    layouts: Mapping[str, Layout],
    load: Load,
    show: bool,
) -> float:
    """Compute and write blocks; return the largest error by the type of a store."""
    here = like(backbone)
    batches = [block.keys[i : i + BATCH] for block in blocks for i in range(0, len(block.keys), BATCH)]
    images = iter(load(batches))
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    error = 0.0
    with (
        torch.inference_mode(),
        as_frozen(here.device.type),
        evaluating(backbone),
        Progress(*columns, disable=not show or not batches) as progress,
    ):
        bar = progress.add_task("", total=sum(map(len, batches)))
        for block in blocks:
            wanting = [store for store, gaps in zip(stores, missing, strict=True) if block in gaps]
            boundaries = [store.cache_key.boundary for store in wanting]
            made: dict[str, list[torch.Tensor]] = {boundary: [] for boundary in boundaries}
            for _ in range(0, len(block.keys), BATCH):
                batch = next(images)
                filled = batch.to(here)
                if len(batch) < BATCH:
                    filled = torch.cat([filled, filled.new_zeros(BATCH - len(batch), *filled.shape[1:])])
                for boundary, rows in activations(backbone, filled, boundaries).items():
                    made[boundary].append(layouts[boundary].to_disk(rows[: len(batch)]).cpu())
                progress.advance(bar, len(batch))
            for store in wanting:
                error = max(error, store.write(block, torch.cat(made.pop(store.cache_key.boundary))))
    return error
