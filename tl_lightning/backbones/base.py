"""The contract of a backbone."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.serialization import InitArgsMixin


class AuxiliaryHead(NamedTuple):
    """A further classifier that is trained on the output of an earlier stage."""

    module: nn.Module
    """From the output of the stage to the logits of pre-training."""
    after: str
    """The stage whose output it takes."""
    weight: float
    """Weight of its loss; the loss of the main head has weight 1."""


class Backbone(InitArgsMixin, nn.Module, ABC):
    """An ordered sequence of named stages, then a pooling.

    A subclass that loads weights takes an argument named ``weights``, and ``weights=None`` must load nothing. A
    checkpoint, which holds the weights itself, rebuilds the backbone in this way.
    """

    feature_dim: int
    """Length D of the pooled features."""
    preprocessing: Preprocessing
    """Preprocessing of the images, as the weights were trained."""
    stages: tuple[str, ...]
    """Names of the stages, input to output."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled features.

        Shape:
            images: (N, 3, H, W). Output: (N, D).
        """

    @abstractmethod
    def forward_map(self, images: Tensor) -> Tensor:
        """Compute the spatial map before the pooling.

        Shape:
            images: (N, 3, H, W). Output: (N, C, h, w).
        """

    @abstractmethod
    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        """Cut the backbone in two, so that ``suffix(prefix(images))`` equals ``self(images)``.

        Both parts share the parameters of this backbone.

        Args:
            stage: The first stage of the suffix. For the first stage of the backbone, the prefix is the identity.

        Returns:
            The prefix and the suffix.

        Raises:
            ValueError: The backbone has no such stage.
        """

    def auxiliary_heads(self) -> dict[str, AuxiliaryHead]:
        """Return the auxiliary heads by name; most networks have none."""
        return {}
