"""Which images a checkpoint was trained on, so that they are not taken for unseen ones."""

import hashlib
from pathlib import Path
from typing import TypedDict

from tl_lightning.data.folder import split_folders


class Provenance(TypedDict):
    """What identifies the training images of a run."""

    root: str
    """Hash of the folder's path."""
    train: str
    """Hash of the paths of the training images within it."""
    seed: int
    """Seed of the split."""
    drawn: bool
    """Whether the split was drawn, rather than given by folders."""


def describe_training_images(root: Path, files: list[str], seed: int) -> Provenance:
    """Describe the training images of a folder."""
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in (str(root.resolve()), "\n".join(files))]
    return {"root": hashes[0], "train": hashes[1], "seed": seed, "drawn": not split_folders(root)}


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
    if now["train"] == then["train"] or not (fitting or (then["drawn"] and now["root"] == then["root"])):
        return
    if now["seed"] != then["seed"]:
        why = f"the split was drawn from seed {then['seed']} then and from {now['seed']} now; give that seed"
    else:
        why = "images, or the shares of the splits, have changed since; restore them, or give folders for the splits"
    consequence = "a resumed run would not be the same run" if fitting else "images trained on would count as unseen"
    raise ValueError(f"the checkpoint was trained on other images of {str(root)!r}, so {consequence}: {why}")
