"""Linear probe."""

from torch import nn

from tl_lightning.heads import LinearHead
from tl_lightning.modules.base import TransferClassifier


class LinearProbe(TransferClassifier):
    """Train one linear layer on the standardised features of a frozen backbone.

    The first thing to try on any data: minutes of training, and hard to get wrong
    (https://arxiv.org/abs/1805.08974, section 4).
    """

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the standardisation and the linear layer."""
        return LinearHead(in_features, num_classes, standardize=True)
