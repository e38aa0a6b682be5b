"""Which images a checkpoint was trained on, so that they are not taken for unseen ones."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from tl_lightning.data.folder import TRAIN, Samples, split_folders


class Provenance(TypedDict):
    """What identifies the training images of a run."""

    images: str
    """Hash of the paths of all labelled images, within the folder."""
    train: str
    """Hash of the paths of the training images within it."""
    seed: int
    """Seed of the split."""
    drawn: bool
    """Whether the split was drawn, rather than given by folders."""


def describe_training_images(root: Path, splits: Mapping[str, Samples], seed: int) -> Provenance:
    """Describe the training images of a folder; copies of the folder are the same."""
    train = splits[TRAIN].files if TRAIN in splits else []
    every = sorted(file for samples in splits.values() for file in samples.files)
    hashes = [hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest() for files in (every, train)]
    return {"images": hashes[0], "train": hashes[1], "seed": seed, "drawn": not split_folders(root)}


def check_training_images(then: Provenance, now: Provenance, root: Path, *, fitting: bool) -> None:
    """Make sure that a resumed run goes on with its images, and that none of them is tested on.

    Args:
        then: Of the checkpoint.
        now: Of the data at hand.
        root: What messages call the data.
        fitting: Whether training goes on; otherwise the checkpoint is scored, on another folder if the user likes.

    Raises:
        ValueError: The images differ.
    """
    if now["train"] == then["train"] or not (fitting or (then["drawn"] and now["images"] == then["images"])):
        return
    if now["seed"] != then["seed"]:
        why = f"the split was drawn from seed {then['seed']} then and from {now['seed']} now; give that seed"
    else:
        why = "images, or the shares of the splits, have changed since; restore them, or give folders for the splits"
    consequence = "a resumed run would not be the same run" if fitting else "images trained on would count as unseen"
    raise ValueError(f"the checkpoint was trained on other images of {str(root)!r}, so {consequence}: {why}")
