"""Draw stratified splits from a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tl_lightning.utils.messages import listed
from tl_lightning.utils.seeding import derive_seed

_NAMED = 5

TRAIN = "train"
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Accepted folder names of each split, in lower or upper case."""


class Samples(NamedTuple):
    """Labelled image files."""

    files: list[str]
    """Paths relative to the root, ``/``-separated, sorted."""
    targets: list[int]
    """Class number of each file."""


def describe_missing_classes(split: str, samples: Samples, class_names: Sequence[str]) -> str | None:
    """Name the classes of which a split has no image, so that its scores say nothing about them.

    Args:
        split: Name of the split, for the text.
        samples: The images of the split.
        class_names: Names of the classes, in the order of their numbers.

    Returns:
        A few words; None if the split has images of all classes.
    """
    present = set(samples.targets)
    missing = [name for number, name in enumerate(class_names) if number not in present]
    if not missing:
        return None
    return f"{split} has no image of {len(missing):,} of {len(class_names):,} classes: {listed(missing, _NAMED)}"


def stratified_split(
    samples: Samples, class_names: Sequence[str], fractions: dict[str, float], seed: int
) -> dict[str, Samples]:
    """Split every class in the same proportions.

    The draw for a class depends on the seed, the name of the class and its own files alone, so it is the same on every
    rank and machine.

    Args:
        samples: The samples to split.
        class_names: Names of the classes, in the order of their numbers.
        fractions: Share of each split but ``train``, which gets the rest.
        seed: Seed of the draw.

    Returns:
        The splits by name. Each class has at least one sample in ``train``, and in every split if it has enough.
    """
    parts: dict[str, list[int]] = {TRAIN: [], **{name: [] for name in fractions}}
    for target, class_name in enumerate(class_names):
        members = [i for i, other in enumerate(samples.targets) if other == target]
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", class_name))
        remaining = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        for name, fraction in fractions.items():
            most = len(remaining) - 1  # one sample is left for train
            count = min(most, max(round(len(members) * fraction), 1 if fraction > 0 else 0))
            parts[name] += remaining[:count]
            remaining = remaining[count:]
        parts[TRAIN] += remaining
    return {
        name: Samples([samples.files[i] for i in sorted(chosen)], [samples.targets[i] for i in sorted(chosen)])
        for name, chosen in parts.items()
    }
