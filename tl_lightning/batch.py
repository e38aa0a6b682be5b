"""The batch that data modules and modules share, and the base classes by which they know each other."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

UNLABELLED = -1
"""Target of an image whose class is unknown, as in prediction."""

PADDING = -1
"""Index of a padding row, added so that all ranks run equally many batches; excluded from losses and metrics."""

UNREADABLE = -2
"""In prediction, an image that could not be read has a row with the index ``PADDING`` and the target ``UNREADABLE``
minus its place in the split."""


class Batch(NamedTuple):
    """Some samples of one split."""

    inputs: Tensor
    """Images (N, 3, H, W), or activations of a boundary (N, ...)."""
    target: Tensor
    """Class numbers (N,), int64; ``UNLABELLED`` where the class is unknown, ``UNREADABLE`` and below where the image
    could not be read."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch does not need
    """Place of each sample in its split (N,), int64; ``PADDING`` for padding rows."""
    boundary: str | None
    """The first stage that still has to run on ``inputs``; None for images."""


class ImageSource:
    """Base class of data modules that tell modules and callbacks about their images.

    A data module of your own may inherit from it too and set the attributes that it knows.
    """

    class_names: Sequence[str] | None = None
    """Names of the classes, in the order of the class numbers."""
    preprocessing: tuple[object, ...] | None = None
    """The :class:`tl_lightning.transforms.Preprocessing` of the images; None while it is unknown."""
    predict_files: Sequence[str] = ()
    """Path of each image to predict, in the order of ``Batch.index``."""
    mark_unreadable: bool = False
    """Whether prediction marks images that cannot be read, for a callback that lists them, instead of raising."""
    views: int = 0
    """Number of stored augmented views of each training image; 0 for the images without augmentation."""


class EqualBatches:
    """Base class of loaders that give all ranks equally many batches, so that ranks may synchronise after each."""


@runtime_checkable
class CacheableModule(Protocol):
    """A module whose frozen stages can be cached: a classifier, as a data module sees it."""

    @property
    def backbone(self) -> nn.Module:
        """The network."""

    def boundaries(self) -> Mapping[int, str]:
        """Map each epoch in which the boundary moves, 0 first, to the first stage whose input can still be cached."""
