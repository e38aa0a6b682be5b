"""Splits: their names, and the seeded, stratified draw of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tl_lightning.utils.seeding import derive_seed

TRAIN = "train"
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What the folder of a split may be called, in lower or upper case."""


class Samples(NamedTuple):
    """Labelled files."""

    files: list[str]
    """Paths relative to the root, ``/``-separated, sorted."""
    targets: list[int]
    """Class number of each file."""


def stratified_split(
    samples: Samples, class_names: Sequence[str], fractions: dict[str, float], seed: int
) -> dict[str, Samples]:
    """Split every class in the same proportions.

    What a class gives to each part depends on the seed, its own name and its own files alone, so it is the same on
    every rank and machine.

    Args:
        samples: What to split.
        class_names: Names of the classes.
        fractions: Share of each part but ``train``, which gets the rest.
        seed: Seed of the draw.

    Returns:
        The parts by name; each class has at least one sample in ``train``, and in every part if it has enough.
    """
    parts: dict[str, list[int]] = {TRAIN: [], **{name: [] for name in fractions}}
    for target, class_name in enumerate(class_names):
        members = [i for i, other in enumerate(samples.targets) if other == target]
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", class_name))
        drawn = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        for name, fraction in fractions.items():
            left = len(drawn) - 1
            share = min(left, max(round(len(members) * fraction), 1 if fraction > 0 else 0))
            parts[name] += drawn[:share]
            drawn = drawn[share:]
        parts[TRAIN] += drawn
    return {
        name: Samples([samples.files[i] for i in sorted(chosen)], [samples.targets[i] for i in sorted(chosen)])
        for name, chosen in parts.items()
    }
