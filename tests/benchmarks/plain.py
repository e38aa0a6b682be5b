"""Time plain PyTorch loops, written as in a tutorial, to compare this library with.

They run in a process of their own and use only the pre-trained backbone of this library.
"""

import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from tl_lightning.backbones import EfficientNetLite
from tl_lightning.transforms import Preprocessing

BATCH = 32
BOUNDARIES = ("blocks.3", "blocks.4", "blocks.5")
"""First trainable stages of the timed fine-tuning steps."""


class Photos(Dataset[tuple[Tensor, int]]):
    """Load images with PIL and the usual transforms."""

    def __init__(self, root: str, files: list[str], targets: list[int], preprocessing: Preprocessing) -> None:
        self.root, self.files, self.targets = Path(root), files, targets
        self.transform = transforms.Compose(
            [
                transforms.Resize(preprocessing.size, transforms.InterpolationMode(preprocessing.interpolation)),
                transforms.CenterCrop(preprocessing.crop),
                transforms.ToTensor(),
                transforms.Normalize(preprocessing.mean, preprocessing.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.root / self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.targets[index]


def time_extraction(model: nn.Module, loader: DataLoader[tuple[Tensor, int]]) -> float:
    """Return the seconds per image to compute features without autograd."""
    start = time.perf_counter()
    count = 0
    with torch.no_grad():
        for images, _ in loader:
            model(images)
            count += len(images)
    return (time.perf_counter() - start) / count


def time_probe_epoch(model: nn.Module, loader: DataLoader[tuple[Tensor, int]], feature_dim: int) -> float:
    """Return the seconds per image of an epoch that runs the frozen network and trains a linear head."""
    head = nn.Linear(feature_dim, 2)
    optimizer = torch.optim.AdamW(head.parameters())
    start = time.perf_counter()
    count = 0
    for images, targets in loader:
        with torch.no_grad():
            features = model(images)
        loss = nn.functional.cross_entropy(head(features), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        optimizer.step()
        count += len(images)
    return (time.perf_counter() - start) / count


def time_fine_tuning_step(
    prefix: nn.Module, suffix: nn.Module, feature_dim: int, images: Tensor, targets: Tensor
) -> float:
    """Return the median seconds of a step that trains the suffix; ``requires_grad`` freezes the prefix."""
    head = nn.Linear(feature_dim, 2)
    for parameter in prefix.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([*suffix.parameters(), *head.parameters()], lr=1e-4)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(head(suffix(prefix(images))), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        optimizer.step()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    root, count = sys.argv[1], int(sys.argv[2])
    files = sorted(path.relative_to(root).as_posix() for path in Path(root).rglob("*.png"))
    files = files[:: max(1, len(files) // count)][:count]
    targets = [int(file.startswith("functional")) for file in files]
    model = EfficientNetLite().eval()
    loader = DataLoader(Photos(root, files, targets, model.preprocessing), BATCH, num_workers=2)
    images, labels = next(iter(loader))
    seconds = {
        "extraction": time_extraction(model, loader),
        "probe_epoch": time_probe_epoch(model, loader, model.feature_dim),
    } | {
        boundary: time_fine_tuning_step(*EfficientNetLite().eval().split(boundary), model.feature_dim, images, labels)
        for boundary in BOUNDARIES
    }
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
