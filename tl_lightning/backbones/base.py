"""The contract of a backbone."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.serialization import InitArgsMixin


class AuxiliaryHead(NamedTuple):
    """A further head that training adds to a branch."""

    module: nn.Module
    """From what its stage makes to the class scores of pre-training."""
    after: str
    """The stage that feeds it."""
    weight: float
    """Of its loss, where the main one has 1."""


class Backbone(InitArgsMixin, nn.Module, ABC):
    """An ordered sequence of named stages, then a pooling.

    A subclass that loads weights takes them as an argument named ``weights``, of which None loads nothing: that is how
    a checkpoint, which holds the weights itself, builds the backbone again.
    """

    feature_dim: int
    """Length D of the pooled vector."""
    preprocessing: Preprocessing
    """What an image goes through before it comes here; from the weights."""
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
        """Compute the spatial map before pooling.

        Shape:
            images: (N, 3, H, W). Output: (N, C, h, w).
        """

    @abstractmethod
    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        """Cut the backbone in two, such that ``suffix(prefix(images))`` equals ``self(images)``.

        Both parts share this backbone's parameters.

        Args:
            stage: The first stage of the suffix; the prefix of the first stage is the identity.

        Returns:
            The prefix and the suffix.

        Raises:
            ValueError: There is no such stage.
        """

    def auxiliary_heads(self) -> dict[str, AuxiliaryHead]:
        """Return the heads that training adds to branches of the network, by name; most networks have none."""
        return {}
