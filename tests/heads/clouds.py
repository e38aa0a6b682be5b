import torch
from torch import Tensor


def overlapping_clouds(classes: int, count: int = 400, features: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw features (count, features) around one centre a class, and class numbers; the last class is the largest."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes * 2, (count,), generator=generator).clamp_max(classes - 1)
    centres = torch.randn(classes, features, generator=generator)
    return centres[target] * 0.4 + torch.randn(count, features, generator=generator), target
