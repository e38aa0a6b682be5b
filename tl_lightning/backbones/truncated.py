"""The first stages of a backbone as a backbone of their own."""

from torch import Tensor, nn

from tl_lightning.backbones._tracing.layout import MeanOverPlaces, to_map
from tl_lightning.backbones.base import Backbone
from tl_lightning.backbones.traced import TracedBackbone
from tl_lightning.utils.messages import unknown


class TruncatedBackbone(Backbone):
    """End a network before one of its stages, and pool what comes out there.

    What a linear probe makes of each stage tells where the network stops being of use for the data at hand
    (https://arxiv.org/abs/1610.01644): far from what it was trained on, earlier features can be the better ones, and they
    cost less. Maps are averaged over all places, tokens over all patches; vectors stay as they are.

    Args:
        backbone: The whole network.
        before: Its first stage that is left out.

    Raises:
        ValueError: There is no such stage, nothing comes before it, or the network cannot be cut.
    """

    def __init__(self, backbone: TracedBackbone, before: str) -> None:
        super().__init__()
        if before == "head":
            raise ValueError(f"'head' means the whole network: use {backbone.name} as it is")
        if before == backbone.stages[0]:
            raise ValueError(f"{backbone.name} is to end before {before!r}, and nothing comes before that")
        backbone.split(before)  # raises where it cannot be cut
        self.backbone = backbone
        self.before = before
        self.name = f"{backbone.name} before {before}"
        self.preprocessing = backbone.preprocessing
        self.stages = backbone.stages[: backbone.stages.index(before)]
        shape = backbone.entering[before]
        height, width = self.preprocessing.crop_shape
        self._pool = MeanOverPlaces.of(shape, height / width)
        self.feature_dim = shape[0] if len(shape) == 1 or self._pool.dims == (2, 3) else shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled features."""
        features: Tensor = self.split(self.stages[0])[1](images)
        return features  # (N, D)

    def forward_map(self, images: Tensor) -> Tensor:
        """Compute the spatial map before pooling.

        Raises:
            ValueError: There is no map any more.
        """
        if not self._pool.dims:
            raise ValueError(f"{self.name} has no spatial map: it ends after the pooling of {self.backbone.name}")
        return to_map(self.backbone.split(self.before)[0](images), images)  # (N, C, h, w)

    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        """Cut the backbone in two before a stage.

        Raises:
            ValueError: There is no such stage.
        """
        if stage not in self.stages:
            raise ValueError(unknown("stage", stage, self.stages, of=self.name))
        return self.backbone.split(stage)[0], self.backbone.between(stage, self.before, self._pool)
