"""Which images a checkpoint was trained on, so that they are not taken for unseen ones."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from tl_lightning.data._folder_index import split_folders
from tl_lightning.data.splits import TRAIN, Samples

_EXCERPT = 4096


class Provenance(TypedDict):
    """What identifies the training images of a run."""

    images: str
    """Hash of the paths of all labelled images, within the folder."""
    train: str
    """Hash of the paths of the training images within it."""
    seed: int
    """Seed of the split."""
    drawn: bool
    """Whether images were drawn from among those for training, for validation at least, rather than all given by folders."""
    each: Tensor
    """What :func:`identify` says of the training images."""


def identify(root: Path, files: Sequence[str]) -> Tensor:
    """Return a number for each image (N,), int64, by which it is known again.

    It is made from the path within the folder, the size and the bytes in the middle of the file: other photos often have
    the same names, and those of some formats the same size, while to read all of a large folder would take minutes.
    """
    digests = (hashlib.blake2b(_excerpt(root, file), digest_size=8).digest() for file in files)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def _excerpt(root: Path, file: str) -> bytes:
    name = file.encode(errors="surrogateescape")
    try:
        with (root / file).open("rb") as image:
            size = image.seek(0, os.SEEK_END)
            image.seek(max(0, (size - _EXCERPT) // 2))
            return name + b"\n%d\n" % size + image.read(_EXCERPT)
    except OSError:  # gone since: no reason to lose a checkpoint
        return name


def describe_training_images(root: Path, splits: Mapping[str, Samples], seed: int, each: Tensor) -> Provenance:
    """Describe the training images of a folder; copies of the folder are the same.

    Args:
        root: The folder.
        splits: What it holds.
        seed: Seed of the split.
        each: What :func:`identify` says of the training images.
    """
    train = splits[TRAIN].files if TRAIN in splits else []
    every = sorted(file for samples in splits.values() for file in samples.files)
    hashes = [hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest() for files in (every, train)]
    return {
        "images": hashes[0],
        "train": hashes[1],
        "seed": seed,
        "drawn": "val" not in split_folders(root),
        "each": each,
    }


def check_resumed_images(then: Provenance, now: Provenance, root: Path) -> None:
    """Make sure that a resumed run goes on with its images.

    Args:
        then: Of the checkpoint.
        now: Of the data at hand.
        root: What messages call the data.

    Raises:
        ValueError: The images differ.
    """
    if now["train"] != then["train"]:
        raise ValueError(
            f"the checkpoint was trained on other images of {str(root)!r}, so a resumed run would not be the same run: "
            f"{_why(then, now)}"
        )


def check_unseen(then: Provenance, now: Provenance, scored: Tensor, root: Path) -> None:
    """Make sure that none of the images that are scored was trained on, unless the user has given them so.

    Args:
        then: Of the checkpoint.
        now: Of the data at hand.
        scored: What :func:`identify` says of the images that are to be scored.
        root: What messages call the data.

    Raises:
        ValueError: Some were trained on, for the split has been drawn in another way.
    """
    if not then["drawn"] or "each" not in then:  # a checkpoint of an earlier version
        return
    seen = int(torch.isin(scored, then["each"]).sum())
    if seen:
        raise ValueError(
            f"the checkpoint was trained on {seen} of these {len(scored)} images of {str(root)!r}, which would count as unseen: "
            f"{_why(then, now)}"
        )


def _why(then: Provenance, now: Provenance) -> str:
    if now["seed"] != then["seed"]:
        return f"the split was drawn from seed {then['seed']} then and from {now['seed']} now; give that seed"
    if now["images"] == then["images"]:
        return "it is the same folder, divided in other shares; leave val_fraction and test_fraction as they were"
    return "images, or the shares of the splits, have changed since; restore them, or give folders for the splits"
