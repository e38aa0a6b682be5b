"""Make a backbone of the first stages of another one."""

from torch import Tensor, nn

from tl_lightning.backbones._tracing.layout import SpatialMean, to_map
from tl_lightning.backbones.base import Backbone
from tl_lightning.backbones.traced import TracedBackbone
from tl_lightning.utils.messages import unknown


class TruncatedBackbone(Backbone):
    """End a network before one of its stages, and average the features there.

    Linear probes at different depths show where a network's features fit the data best
    (https://arxiv.org/abs/1610.01644). For data far from that of pre-training, earlier features can be the better ones,
    and they cost less. Maps are averaged over all places, tokens over all patches; vectors stay as they are.

    Args:
        backbone: The whole network.
        before: The first stage to leave out.

    Raises:
        ValueError: The network has no such stage, no stage comes before it, or the network cannot be cut there.
    """

    def __init__(self, backbone: TracedBackbone, before: str) -> None:
        super().__init__()
        if before == "head":
            raise ValueError(f"before='head' would keep all stages: use {backbone.name} itself")
        if before == backbone.stages[0]:
            raise ValueError(
                f"{before!r} is the first stage of {backbone.name}, so nothing comes before it: give a later stage"
            )
        backbone.split(before)  # raises if the network cannot be cut there
        self.backbone = backbone
        self.before = before
        self.name = f"{backbone.name} before {before}"
        self.preprocessing = backbone.preprocessing
        self.stages = backbone.stages[: backbone.stages.index(before)]
        shape = backbone.input_shapes[before]
        height, width = self.preprocessing.crop_shape
        self._pool = SpatialMean.for_shape(shape, height / width)
        self.feature_dim = shape[0] if len(shape) == 1 or self._pool.dims == (2, 3) else shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled features."""
        features: Tensor = self.split(self.stages[0])[1](images)
        return features  # (N, D)

    def forward_map(self, images: Tensor) -> Tensor:
        """Compute the spatial map before the pooling.

        Raises:
            ValueError: The network ends after its own pooling.
        """
        if not self._pool.dims:
            raise ValueError(f"{self.name} has no spatial map: it ends after the pooling of {self.backbone.name}")
        return to_map(self.backbone.split(self.before)[0](images), images)  # (N, C, h, w)

    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        """Cut the backbone in two before a stage.

        Raises:
            ValueError: The network has no such stage before its end.
        """
        if stage not in self.stages:
            raise ValueError(unknown("stage", stage, self.stages, of=self.name))
        return self.backbone.split(stage)[0], self.backbone.segment(stage, self.before, self._pool)
