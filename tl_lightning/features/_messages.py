"""What is said about stored features."""

from collections.abc import Callable, Mapping

from tl_lightning.features._disk_space import advice, free_space, gigabytes, row_bytes
from tl_lightning.features._manifest import Layout, cache_keys_in
from tl_lightning.features.cache_key import CacheKey
from tl_lightning.features.store import FeatureStore
from tl_lightning.freezing import HEAD, MAP
from tl_lightning.utils.paths import short_path

_SHOWN = 3
_SHORT = 24


def name_of(boundary: str) -> str:
    """Say what is stored at a boundary."""
    return {HEAD: "pooled features", MAP: "the spatial map"}.get(boundary, f"activations before {boundary}")


def describe_gaps(store: FeatureStore, names: Mapping[str, str]) -> str:
    """Say why rows have to be computed, if there are others that nearly fit; else nothing.

    Args:
        store: Where they belong.
        names: Of the rows wanted, by key.
    """
    if not store.blocks:
        cache_keys = [r for r in cache_keys_in(store.folder.parent) if r.boundary == store.cache_key.boundary]
        if store.cache_key in cache_keys:
            return "those that are stored there stay, and were made by other code"
        nearest = min((_differing(store.cache_key, cache_key) for cache_key in cache_keys), key=len, default={})
        if not nearest or nearest.keys() >= {"backbone", "weights"}:  # those of another network are no news
            return ""
        fields = (f"{name} ({value})" if len(value) <= _SHORT else name for name, value in nearest.items())
        return f"those that are stored there stay, and differ in {' and '.join(fields)}"
    before = {name for block in store.blocks for _, name in block.names}
    lacking = [name for key, name in names.items() if key not in store]
    changed = [name for name in lacking if name in before]
    new = [name for name in lacking if name not in before]
    parts = [
        f"{len(group):,} {what} ({', '.join(group[:_SHOWN])}{', ...' if len(group) > _SHOWN else ''})"
        for what, group in (("changed", changed), ("new", new))
        if group
    ]
    lost = sum(len(block.names) for block in store.blocks if not store.is_written(block))
    anew = [f"computed anew for images: {' and '.join(parts)}"] if parts else []
    return "; ".join(anew + [f"the shards of {lost:,} are missing or cut short"] * (lost > 0))


def _differing(cache_key: CacheKey, other: CacheKey) -> dict[str, str]:
    """Return the fields in which another cache_key differs, with its values."""
    return {name: str(its) for name, mine, its in zip(cache_key._fields, cache_key, other, strict=True) if mine != its}


def describe_plan(
    store: FeatureStore, layout: Layout, rows: int, names: Mapping[str, str], seconds: Callable[[], float]
) -> str:
    """Say what is going to be written, why, and whether it pays.

    Args:
        store: Where to.
        layout: Of a row.
        rows: How many there are to write.
        names: Of the rows wanted, by key.
        seconds: Measures what the network takes for a row.
    """
    shape = " x ".join(map(str, layout.shape))
    size = rows * row_bytes(layout, store.cache_key.dtype)
    there = f"; the other {len(names) - rows:,} are there" if rows < len(names) else ""
    further = [describe_gaps(store, names), advice(layout, store.cache_key.dtype, len(names), seconds)]
    return (
        f"storing {name_of(store.cache_key.boundary)}, {shape} {store.cache_key.dtype}, of {rows:,} images: {gigabytes(size)} of "
        f"{gigabytes(free_space(store.folder))} free, in {short_path(store.folder)}{there}"
        + "".join(f"; {text}" for text in further if text)
    )


def describe(rows: int, seconds: float, error: float, dtype: str) -> str:
    """Say what an extraction did.

    Args:
        rows: Images that went through the network.
        seconds: That it took.
        error: Relative error by the type.
        dtype: The type.
    """
    by_type = f"; relative error by {dtype} {error:.1e}" if error else ""
    rate = rows / max(seconds, 1e-9)
    return f"{rows:,} images in {seconds:.0f} s ({rate:,.{0 if rate >= 10 else 1}f} a second){by_type}"
