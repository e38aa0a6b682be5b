"""Auxiliary heads, such as those of Inception and GoogLeNet."""

import copy
from collections.abc import Collection

from torch import Tensor, nn

from tl_lightning import freezing
from tl_lightning.backbones import Backbone, Segment, stages_of
from tl_lightning.heads import resize_last_linear


class AuxiliaryHeads(nn.ModuleDict):
    """The auxiliary heads whose stages may train, each with a new last layer.

    See https://arxiv.org/abs/1512.00567, section 4.

    Args:
        backbone: The pre-trained network, which has the heads of pre-training.
        trainable: Names of the stages that may ever train.
        num_classes: Number K of classes.
    """

    def __init__(self, backbone: Backbone, trainable: Collection[str], num_classes: int) -> None:
        super().__init__()
        self._sources = {n: head for n, head in backbone.auxiliary_heads().items() if head.after in trainable}
        self._trained: Collection[str] = ()
        self._logits: list[tuple[float, Tensor]] = []
        for name, head in self._sources.items():
            self[name] = resize_last_linear(copy.deepcopy(head.module), num_classes)

    def train_with(self, stages: Collection[str]) -> None:
        """Train the heads whose stages train now, and freeze the others."""
        self._trained = stages
        for name, head in self._sources.items():
            freezing.set_trainable(self[name], head.after in stages)

    def run(self, suffix: nn.Module, inputs: Tensor) -> Tensor:
        """Run the trainable part of the backbone and, on the way, the trained heads."""
        active = {head.after: name for name, head in self._sources.items() if head.after in self._trained}
        if not active or not isinstance(suffix, Segment):
            features: Tensor = suffix(inputs)
            return features
        for stage, run in stages_of(suffix):
            inputs = run(inputs)
            if stage in active:
                name = active[stage]
                self._logits.append((self._sources[name].weight, self[name](inputs)))
        return inputs

    def take_logits(self) -> list[tuple[float, Tensor]]:
        """Return the loss weight and logits (N, K) of each head that ran since the last call."""
        logits, self._logits = self._logits, []
        return logits
