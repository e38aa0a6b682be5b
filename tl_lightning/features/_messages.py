"""Tell the user which features are computed, and why."""

from collections.abc import Mapping

from tl_lightning.features._disk_space import free_space, gigabytes
from tl_lightning.features._manifest import Layout, cache_keys_in
from tl_lightning.features.cache_key import CacheKey
from tl_lightning.features.store import FeatureStore
from tl_lightning.freezing import HEAD, MAP
from tl_lightning.utils.paths import short_path

_NAMES_SHOWN = 3
_LONGEST_VALUE = 24


def describe_boundary(boundary: str) -> str:
    """Name the activations at a boundary."""
    return {HEAD: "pooled features", MAP: "the spatial map"}.get(boundary, f"activations before {boundary}")


def describe_gaps(store: FeatureStore, names: Mapping[str, str]) -> str:
    """Say why rows are computed although similar ones are cached; return an empty string if there are no similar ones.

    Args:
        store: The store of the rows.
        names: The name of each wanted row, by content key.
    """
    if not store.blocks:
        return _describe_nearest(store)
    before = {name for block in store.blocks for _, name in block.names}
    lacking = [name for key, name in names.items() if key not in store]
    changed = [name for name in lacking if name in before]
    new = [name for name in lacking if name not in before]
    parts = [
        f"{len(group):,} {kind} ({', '.join(group[:_NAMES_SHOWN])}{', ...' if len(group) > _NAMES_SHOWN else ''})"
        for kind, group in (("changed", changed), ("new", new))
        if group
    ]
    lost = sum(len(block.names) for block in store.blocks if not store.is_written(block))
    why = [f"images: {' and '.join(parts)}"] if parts else []
    return "; ".join(why + [f"the shards of {lost:,} rows are missing or cut short"] * (lost > 0))


def _describe_nearest(store: FeatureStore) -> str:
    """Say how the cache key differs from the most similar one in the same cache folder."""
    others = [key for key in cache_keys_in(store.folder.parent) if key.boundary == store.cache_key.boundary]
    nearest = min((_differing(store.cache_key, other) for other in others), key=len, default={})
    if not nearest or nearest.keys() >= {"backbone", "weights"}:  # rows of another network need no explanation
        return ""
    fields = (f"{name} ({value})" if len(value) <= _LONGEST_VALUE else name for name, value in nearest.items())
    return f"the rows cached before differ in {' and '.join(fields)}, and are kept"


def _differing(cache_key: CacheKey, other: CacheKey) -> dict[str, str]:
    """Return the fields in which another cache key differs, with its values."""
    return {name: str(its) for name, mine, its in zip(cache_key._fields, cache_key, other, strict=True) if mine != its}


def describe_plan(store: FeatureStore, layout: Layout, rows: int, names: Mapping[str, str], warning: str) -> str:
    """Say which rows are about to be written, where, and why.

    Args:
        store: The store of the rows.
        layout: The layout of a row.
        rows: The number of rows to write.
        names: The name of each wanted row, by content key.
        warning: Put at the end; may be empty.
    """
    dtype = store.cache_key.dtype
    shape = " x ".join(map(str, layout.shape))
    others = f"; the other {len(names) - rows:,} are cached" if rows < len(names) else ""
    return (
        f"caching {describe_boundary(store.cache_key.boundary)}, {shape} {dtype}, of {rows:,} images: "
        f"{gigabytes(rows * layout.row_bytes(dtype))} of {gigabytes(free_space(store.folder))} free, in "
        f"{short_path(store.folder)}{others}"
        + "".join(f"; {text}" for text in (describe_gaps(store, names), warning) if text)
    )


def describe_stats(rows: int, seconds: float, error: float, dtype: str) -> str:
    """Say how long an extraction took, and how much its dtype rounds.

    Args:
        rows: Images that went through the network.
        seconds: Duration.
        error: Relative rounding error of the dtype.
        dtype: The dtype of the cached rows.
    """
    rounding = f"; relative error by {dtype} {error:.1e}" if error else ""
    rate = rows / max(seconds, 1e-9)
    return f"{rows:,} images in {seconds:.0f} s ({rate:,.{0 if rate >= 10 else 1}f} a second){rounding}"
