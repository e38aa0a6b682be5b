"""Small test doubles: a backbone with every kind of layer that can drift, and folders of images."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tl_lightning.backbones import TracedBackbone
from tl_lightning.heads import LinearHead
from tl_lightning.modules import LinearProbe
from tl_lightning.transforms import Preprocessing

TINY = Preprocessing(size=20, crop=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Block(nn.Module):
    def __init__(self, before: int, after: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(after)
        self.dropout = nn.Dropout(dropout)
        self.depth = StochasticDepth(dropout, "row")

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.depth(self.dropout(self.norm(self.conv(inputs)).relu()))
        return output


class TinyNet(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout = dropout
        self.stem = Block(3, 8, dropout)
        self.layer1 = Block(8, 12, dropout)
        self.layer2 = Block(12, 16, dropout)
        self.layer3 = Block(16, 24, dropout)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return nn.functional.dropout(features.mean((2, 3)), self.dropout, self.training)


class TinyBackbone(TracedBackbone):
    """A backbone with batch norm, dropout, stochastic depth, and functional dropout that reads ``self.training``."""

    def __init__(self, seed: int = 0, weights: str | None = "DEFAULT", dropout: float = 0.3) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if weights is not None else 1000 + seed)
            net = TinyNet(dropout)
            for name, buffer in net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.1)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.02, 0.06)  # small, so that the features do not vanish
        super().__init__(net, "tiny", TINY)


class DropoutProbe(LinearProbe):
    """A linear probe with dropout in its head."""

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        return LinearHead(in_features, num_classes, standardize=True, dropout=0.5)


def save_image(path: Path, seed: int, colour: int = 0, size: tuple[int, int] = (24, 22)) -> None:
    """Save noise with one brighter channel as a lossless image."""
    pixels = np.random.default_rng(seed).integers(0, 160, (*size, 3))
    pixels[..., colour % 3] += 90
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def image_folder(root: Path, classes: Mapping[str, int]) -> Path:
    """Make a folder of class folders with the given numbers of images."""
    for number, (name, count) in enumerate(classes.items()):
        for i in range(count):
            save_image(root / name / f"{i:03d}.png", seed=1000 * number + i, colour=number)
    return root
