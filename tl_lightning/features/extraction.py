"""Compute the rows that stores lack: each rank computes its share, in whole shards."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tl_lightning.backbones import Backbone
from tl_lightning.features._determinism import check_deterministic, pattern_rows
from tl_lightning.features._disk_space import check_space, warn_of_large_rows
from tl_lightning.features._manifest import Block, Layout, StaleStoreError
from tl_lightning.features._messages import describe_plan, describe_stats
from tl_lightning.features.activations import activations, reference_tensor
from tl_lightning.features.cache_key import CacheKey
from tl_lightning.features.store import FeatureStore
from tl_lightning.freezing import eval_mode, frozen_forward
from tl_lightning.utils.distributed import (
    all_gather_object,
    broadcast_object,
    hold_file_locks,
    raise_on_all_ranks,
    rank_and_world_size,
)
from tl_lightning.utils.memory import keep_freed_memory

BATCH = 32
"""Images of every pass through the network: kernels sum in another order for another batch size."""

Load = Callable[[Sequence[Sequence[str]]], Iterable[torch.Tensor]]
"""From the content keys of each batch to the images (n, 3, H, W) of each batch, in the same order."""


class ExtractionStats(NamedTuple):
    """Size, duration and rounding error of an extraction, over all ranks."""

    rows: int
    """Images, or views of images, that went through the network."""
    seconds: float
    error: float
    """Largest relative rounding error of a shard: norm of the difference over norm of the rows; 0 for float32."""


def check_ranks(cache_keys: Sequence[CacheKey]) -> None:
    """Make sure that all ranks would compute the same rows, before any of them writes one.

    Raises:
        StaleStoreError: The keys of another rank differ; the message names the fields.
    """
    first, *others = all_gather_object(list(cache_keys))
    for rank, other in enumerate(others, 1):
        for cache_key, its in zip(first, other, strict=True):
            if its != cache_key:
                differences = "; ".join(its.differences(cache_key, "rank 0 has"))
                raise StaleStoreError(
                    f"rank {rank} would compute other features than rank 0 ({differences}): start all processes with "
                    "the same code, libraries, weights and options"
                )


def extract(
    backbone: Backbone,
    stores: Sequence[FeatureStore],
    names: Mapping[str, str],
    load: Load,
    *,
    log: Callable[[str], object] | None = None,
) -> ExtractionStats:
    """Compute and write the rows that stores lack, in one pass over the images for all boundaries.

    Rows that are complete are not computed again, so that an interrupted extraction continues. Call it on all ranks:
    each computes whole shards, and it returns when all are written.

    Args:
        backbone: The network, on its device. Its convolutions get the memory layout that a classifier gives them.
        stores: Stores of this backbone, one for each boundary.
        names: The name of each wanted row, by content key; new rows are computed in this order.
        load: Loads images.
        log: Takes messages on the first rank, which also draws a progress bar then; None stays silent.

    Raises:
        OSError: The disk has too little space.
        ValueError: An image cannot be read, an activation does not fit the dtype of the store, or the activations of an
            image depend on chance or on its batch.
        StaleStoreError: The ranks would compute different rows.
        RuntimeError: Another rank failed, or does not see the same folder.
    """
    begin = time.monotonic()
    rank, world = rank_and_world_size()
    if rank != 0:
        log = None
    check_ranks([store.cache_key for store in stores])
    backbone.to(memory_format=torch.channels_last)  # another layout would give other bits under the same cache key
    if broadcast_object(all(store.has_all(names) for store in stores)):
        return ExtractionStats(0, 0.0, 0.0)
    stores = sorted(stores, key=lambda store: store.folder)
    reference = reference_tensor(backbone)
    if reference.device.type == "cpu":
        keep_freed_memory()
    error = 0.0
    with hold_file_locks([store.lock for store in stores], f"computing features in {stores[0].folder}"):
        with raise_on_all_ranks():
            for store in stores:
                store.reload()
            layouts = _layouts(backbone, stores)
        plans, missing = broadcast_object(_plan(stores, names))
        blocks = list(dict.fromkeys(block for gaps in missing for block in gaps))
        with raise_on_all_ranks():
            for store, gaps in zip(stores, missing, strict=True):
                layout = layouts[store.cache_key.boundary]
                rows = sum(len(block.names) for block in gaps)
                check_space(store, layout, rows)
                if log is not None and rows:
                    image_bytes = torch.Size((3, *backbone.preprocessing.crop_shape)).numel()
                    warning = warn_of_large_rows(
                        layout, store.cache_key.dtype, len(names), image_bytes, reference.device
                    )
                    log(describe_plan(store, layout, rows, names, warning))
            error = _compute(backbone, stores, missing, blocks[rank::world], layouts, load, log is not None)
        with raise_on_all_ranks():
            for store, plan, gaps in zip(stores, plans, missing, strict=True):
                if rank == 0:
                    store.finish(plan, gaps, layouts[store.cache_key.boundary])
        with raise_on_all_ranks():
            for store in stores:
                store.reload()
            if not all(store.has_all(names) for store in stores):
                raise RuntimeError(
                    f"rank {rank} does not see the features that were just written to {str(stores[0].folder)!r}: give "
                    "a cache_dir that all machines share"
                )
    stats = ExtractionStats(
        sum(len(block.names) for block in blocks), time.monotonic() - begin, max(all_gather_object(error))
    )
    if log is not None and stats.rows:
        log(describe_stats(*stats, stores[0].cache_key.dtype))
    return stats


def _layouts(backbone: Backbone, stores: Sequence[FeatureStore]) -> dict[str, Layout]:
    """Return the layout of the rows at each boundary, and check the backbone where a store begins."""
    found = {store.cache_key.boundary: store.layout for store in stores}
    new = [boundary for boundary, layout in found.items() if layout is None]
    for boundary in new:
        check_deterministic(backbone, boundary)
    rows = pattern_rows(backbone, new) if new else {}
    return {boundary: layout or Layout.of(rows[boundary]) for boundary, layout in found.items()}


def _plan(stores: Sequence[FeatureStore], names: Mapping[str, str]) -> tuple[list[list[Block]], list[list[Block]]]:
    """Return the blocks that each store will have, and those of them that are not written yet."""
    plans = [store.plan(names) for store in stores]
    return plans, [[b for b in plan if not store.is_written(b)] for store, plan in zip(stores, plans, strict=True)]


def _compute(
    backbone: Backbone,
    stores: Sequence[FeatureStore],
    missing: Sequence[Sequence[Block]],
    blocks: Sequence[Block],
    layouts: Mapping[str, Layout],
    load: Load,
    show: bool,
) -> float:
    """Compute and write blocks; return the largest rounding error of a shard."""
    reference = reference_tensor(backbone)
    batches = [block.keys[i : i + BATCH] for block in blocks for i in range(0, len(block.keys), BATCH)]
    images = iter(load(batches))
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    error = 0.0
    with (
        torch.inference_mode(),
        frozen_forward(reference.device.type),
        eval_mode(backbone),
        Progress(*columns, disable=not show or not batches) as progress,
    ):
        bar = progress.add_task("", total=sum(map(len, batches)))
        for block in blocks:
            lacking = [store for store, gaps in zip(stores, missing, strict=True) if block in gaps]
            boundaries = [store.cache_key.boundary for store in lacking]
            made: dict[str, list[torch.Tensor]] = {boundary: [] for boundary in boundaries}
            for _ in range(0, len(block.keys), BATCH):
                batch = next(images)
                full = batch.to(reference)
                if len(batch) < BATCH:
                    full = torch.cat([full, full.new_zeros(BATCH - len(batch), *full.shape[1:])])
                for boundary, rows in activations(backbone, full, boundaries).items():
                    made[boundary].append(layouts[boundary].to_disk(rows[: len(batch)]).cpu())
                progress.advance(bar, len(batch))
            for store in lacking:
                error = max(error, store.write(block, torch.cat(made.pop(store.cache_key.boundary))))
    return error
