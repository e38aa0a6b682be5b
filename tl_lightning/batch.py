"""All that modules and data share."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

UNLABELLED = -1
"""Target of an image whose class is not known, as in prediction."""

PADDING = -1
"""Index of a row that only fills up a batch, so that every rank runs as many batches; it counts for nothing."""


class Batch(NamedTuple):
    """Some samples of one split."""

    inputs: Tensor
    """Images (N, 3, H, W), or activations of a boundary (N, ...)."""
    target: Tensor
    """Class numbers (N,), int64; ``UNLABELLED`` where the class is not known."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch has no use for
    """Each sample's place in its split (N,), int64; ``PADDING`` for rows that count for nothing."""
    boundary: str | None
    """The stage that continues from ``inputs``; None where these are images."""


@runtime_checkable
class NamesClasses(Protocol):
    """Whatever knows the names of the classes: a data module, for the module that trains on it."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, in the order of the class numbers."""


@runtime_checkable
class NamesFiles(Protocol):
    """Whatever knows the files that are predicted: a data module, for those who write predictions down."""

    @property
    def predict_files(self) -> Sequence[str]:
        """Path of each image to predict, in the order of ``Batch.index``."""


@runtime_checkable
class Preprocesses(Protocol):
    """Whatever prepares images for a network: a data module, for the module whose network sees them."""

    @property
    def preprocessing(self) -> tuple[object, ...] | None:
        """What the images go through; None if it is not known."""


@runtime_checkable
class IdentifiesImages(Protocol):
    """Whatever knows images again: a data module, for the module that must not be scored on what it was trained on."""

    def identify(self, split: str) -> Tensor:
        """Return a number for each image of a split (N,), int64."""


@runtime_checkable
class ServesViews(Protocol):
    """Whatever serves augmented views in turn: a data module, for the module that sees each image once."""

    views: int
    """Number of views of each training image; 0 for the images as they are."""


@runtime_checkable
class KeepsInStep(Protocol):
    """Whatever serves all ranks equally many batches: a loader, for those who let the ranks agree after each."""

    in_step: Literal[True]
    """That it does."""


@runtime_checkable
class RunsFrom(Protocol):
    """Whatever can go on from what a part of its network made: a module, for the data module that stores it."""

    @property
    def backbone(self) -> nn.Module:
        """The network."""

    def boundaries(self) -> Mapping[int, str]:
        """Return from which epoch on, 0 first, which boundary the network has to be run from."""
