"""What is said about stored features."""

from collections.abc import Mapping, Sequence

from tl_lightning.features.estimate import gigabytes, row_bytes
from tl_lightning.features.extraction import Extracted
from tl_lightning.features.store import FeatureStore, recipes_in

_SHOWN = 3


def describe_gaps(store: FeatureStore, names: Mapping[str, str]) -> str:
    """Say why rows have to be computed, if there are others that nearly fit; else nothing.

    Args:
        store: Where they belong.
        names: Of the rows wanted, by key.
    """
    if not len(store):
        recipes = [r for r in recipes_in(store.folder.parent) if r.boundary == store.recipe.boundary]
        others = [store.recipe.differences(recipe) for recipe in recipes]
        nearest = min(others, key=len, default=[])
        return f"none are stored that fit, since {'; '.join(nearest)}" if nearest else ""
    before = {name for block in store.blocks for _, name in block.names}
    lacking = [name for key, name in names.items() if key not in store]
    changed = [name for name in lacking if name in before]
    new = [name for name in lacking if name not in before]
    parts = [
        f"{len(group):,} {what} ({', '.join(group[:_SHOWN])}{', ...' if len(group) > _SHOWN else ''})"
        for what, group in (("changed", changed), ("new", new))
        if group
    ]
    return f"computed anew for images: {' and '.join(parts)}" if parts else ""


def describe(done: Extracted, stores: Sequence[FeatureStore]) -> str:
    """Say what an extraction did."""
    sizes = []
    for store in stores:
        assert store.layout is not None  # noqa: S101 - it was just written
        shape = " x ".join(map(str, store.layout.shape))
        size = gigabytes(len(store) * row_bytes(store.layout, store.recipe.dtype))
        sizes.append(f"{shape} {store.recipe.dtype} at {store.recipe.boundary!r}, {size} in {store.folder}")
    error = f"; relative error by {stores[0].recipe.dtype} {done.error:.1e}" if done.error else ""
    rate = done.rows / max(done.seconds, 1e-9)
    return f"{done.rows:,} images in {done.seconds:.0f} s ({rate:.0f} a second): {'; '.join(sizes)}{error}"
