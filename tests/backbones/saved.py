"""State dicts as training programs save them, and a small network to load them into."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tl_lightning.backbones.weights import load_weights_file

State = dict[str, Tensor]


def network(num_classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = timm.create_model("test_resnet", num_classes=num_classes)
    return built


def put(prefix: str, state: State, **more: Any) -> dict[str, Any]:
    return more | {prefix + name: tensor for name, tensor in state.items()}


def moved(state: State, by: float = 1.0) -> State:
    return {name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def load(content: Any, path: Path) -> State:
    """Save a file, and load it into a network without a classifier, whose parameters were zero."""
    torch.save(content, path)
    empty = network(0)
    for parameter in empty.parameters():
        nn.init.zeros_(parameter)
    load_weights_file(empty, path, name="test_resnet", classifier="fc")
    return dict(empty.state_dict())


def assert_same(loaded: State, expected: State) -> None:
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
