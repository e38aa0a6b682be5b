"""Identify the training images of a checkpoint, so that they are never scored as unseen ones."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from tl_lightning.data._folder_index import split_folders
from tl_lightning.data.splits import TRAIN, Samples
from tl_lightning.utils.messages import listed

_EXCERPT_BYTES = 4096


class Provenance(TypedDict):
    """Identity of the training images of a run, as written into checkpoints."""

    images: str
    """Hash of the paths of all labelled images, relative to the folder."""
    train: str
    """Hash of the paths of the training images, relative to the folder."""
    seed: int
    """Seed of the split."""
    drawn: bool
    """Whether a random draw separated training from validation images; False if folders gave both."""
    each: Tensor
    """The IDs of the training images, from :func:`compute_image_ids`."""


def compute_image_ids(root: Path, files: Sequence[str]) -> Tensor:
    """Return a number for each image (N,), int64, that identifies the image in later runs.

    The number is a hash of the path in the folder, the size, and the bytes in the middle of the file. Other photos
    often have the same names, and in some formats the same size. Reading all bytes of a large folder would take
    minutes. So a change elsewhere in the file that keeps its size is not noticed, as one of a few pixels in a bitmap.
    """
    digests = (hashlib.blake2b(_excerpt(root, file), digest_size=8).digest() for file in files)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def _excerpt(root: Path, file: str) -> bytes:
    name = file.encode(errors="surrogateescape")
    try:
        with (root / file).open("rb") as image:
            size = image.seek(0, os.SEEK_END)
            image.seek(max(0, (size - _EXCERPT_BYTES) // 2))
            return name + b"\n%d\n" % size + image.read(_EXCERPT_BYTES)
    except OSError:  # a file that has been removed since must not cost a checkpoint
        return name


def describe_training_images(root: Path, splits: Mapping[str, Samples], seed: int, ids: Tensor) -> Provenance:
    """Identify the training images of a folder; a copy of the folder gives the same result.

    Args:
        root: The folder.
        splits: The labelled images of the folder.
        seed: Seed of the split.
        ids: The IDs of the training images, from :func:`compute_image_ids`.
    """
    train = splits[TRAIN].files if TRAIN in splits else []
    labelled = sorted(file for samples in splits.values() for file in samples.files)
    hashes = [
        hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest() for files in (labelled, train)
    ]
    return {
        "images": hashes[0],
        "train": hashes[1],
        "seed": seed,
        "drawn": "val" not in split_folders(root),
        "each": ids,
    }


def check_resumed_images(saved: Provenance, current: Provenance, root: Path, files: Sequence[str] = ()) -> None:
    """Check that a resumed run trains on the same images, with the same content.

    Args:
        saved: Provenance in the checkpoint.
        current: Provenance of the present data.
        root: Folder of the images, for the message.
        files: The training images, in the order of their IDs, for the message.

    Raises:
        ValueError: The images differ.
    """
    if current["train"] != saved["train"]:
        raise ValueError(
            f"the checkpoint was trained on other images of {str(root)!r}, so a resumed run would not be the "
            f"same run: {_difference(saved, current)}"
        )
    # A checkpoint of an earlier version has no IDs.
    changed = (saved["each"] != current["each"]).nonzero().flatten().tolist() if "each" in saved else []
    if changed:
        names = f": {listed([files[place] for place in changed])}" if files else ""
        raise ValueError(
            f"the content of {len(changed)} of the {len(saved['each'])} training images in {str(root)!r} has changed "
            f"since the checkpoint{names}. Restore these files, or give the folder that the run was trained on; to "
            "train on the new content, leave --ckpt_path out"
        )


def check_unseen(saved: Provenance, current: Provenance, scored: Tensor, root: Path) -> None:
    """Check that no image to be scored was trained on, unless folders gave the splits.

    Args:
        saved: Provenance in the checkpoint.
        current: Provenance of the present data.
        scored: The IDs of the images to be scored, from :func:`compute_image_ids`.
        root: Folder of the images, for the message.

    Raises:
        ValueError: Some were trained on, since the split was drawn in another way.
    """
    if not saved["drawn"] or "each" not in saved:  # an earlier version wrote the checkpoint
        return
    seen = int(torch.isin(scored, saved["each"]).sum())
    if seen:
        raise ValueError(
            f"the checkpoint was trained on {seen} of these {len(scored)} images of {str(root)!r}, which would count "
            f"as unseen: {_difference(saved, current)}"
        )


def _difference(saved: Provenance, current: Provenance) -> str:
    if current["seed"] != saved["seed"]:
        return (
            f"the split was drawn from seed {saved['seed']} then and from seed {current['seed']} now; set the seed to "
            f"{saved['seed']}"
        )
    if current["images"] == saved["images"]:
        return "the folder is the same, but its split fractions differ; set val_fraction and test_fraction as they were"
    return (
        "images were added, removed or renamed since, or the split fractions differ; restore them, or put each split "
        "into a folder of its own"
    )
