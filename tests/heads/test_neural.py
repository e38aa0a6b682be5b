from typing import Literal

import pytest
import torch
from torch import nn

from tl_lightning.heads import ConvHead, CosineHead, LinearHead, MLPHead, resize_last_linear


def test_linear_head_maps_features_to_logits() -> None:
    head = LinearHead(6, 3, standardize=True, dropout=0.5)
    assert head(torch.randn(8, 6)).shape == (8, 3)
    assert sum(p.numel() for p in head.parameters()) == 6 * 3 + 3
    head.eval()
    features = torch.randn(8, 6)
    assert torch.equal(head(features), head(features))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_mlp_head_has_the_chosen_layers(norm: Literal["none", "batch", "layer"]) -> None:
    head = MLPHead(8, 3, hidden=[7, 5], dropout=0.5, norm=norm)
    assert head(torch.randn(4, 8)).shape == (4, 3)
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8, 7), (7, 5), (5, 3)]
    kinds = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    assert sum(isinstance(module, kinds[norm]) for module in head.modules()) == 2
    head.eval()
    features = torch.randn(4, 8)
    assert torch.equal(head(features), head(features))
    with pytest.raises(ValueError, match=r"hidden is \[\]"):
        MLPHead(8, 3, hidden=[])


def test_cosine_head_ignores_the_length_of_features() -> None:
    head = CosineHead(8, 3, scale=4.0)
    features = torch.randn(5, 8)
    assert torch.allclose(head(features), head(7 * features), atol=1e-6)
    assert head(head.weight.detach()).diagonal().tolist() == pytest.approx([4.0] * 3)
    assert {name for name, _ in head.named_parameters()} == {"weight", "scale"}


def test_conv_head_convolves_before_it_pools() -> None:
    head = ConvHead(6, 3, channels=5)
    spatial = torch.randn(2, 6, 4, 7)
    expected = head.linear(head.conv(spatial).relu().mean((2, 3)))
    assert torch.equal(head(spatial), expected)
    mirrored = head(spatial.flip(3))
    assert not torch.allclose(mirrored, expected), "the layout of the map makes no difference: it was pooled first"
    with pytest.raises(ValueError, match="kernel_size is 4; it must be odd"):
        ConvHead(6, 3, kernel_size=4)


def test_last_linear_layer_of_a_head_is_resized() -> None:
    head = resize_last_linear(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1000)), 3)
    assert head(torch.zeros(1, 4)).shape == (1, 3)
