from typing import Literal

import pytest
import torch
from torch import nn

from tl_lightning.heads import ConvHead, CosineHead, LinearHead, MLPHead, Standardize, resize_last_linear


def test_statistics_are_those_of_everything_seen() -> None:
    layer = Standardize(5).double().train()
    features = torch.randn(97, 5, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3, 1]) + torch.tensor(
        [0, 50, -3, 1, 9]
    )
    for batch in torch.split(features, [32, 1, 40, 24]):
        layer(batch)
    assert torch.allclose(layer.mean, features.mean(0), atol=1e-12)
    assert torch.allclose(layer.variance, features.var(0, correction=0), rtol=1e-12)
    assert int(layer.count) == 97


def test_single_precision_survives_a_mean_far_from_zero() -> None:
    layer = Standardize(50).train()
    features = 1000 + torch.randn(4096, 50)
    for batch in torch.split(features, 32):
        layer(batch)
    assert torch.allclose(layer.variance, features.var(0, correction=0), rtol=1e-3)


def test_output_of_a_sample_does_not_depend_on_its_batch() -> None:
    layer = Standardize(4).train()
    layer(torch.randn(50, 4))
    layer.eval()
    features = torch.randn(6, 4)
    assert torch.equal(layer(features)[:1], layer(features[:1]))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(features)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_linear_head_maps_features_to_scores() -> None:
    head = LinearHead(6, 3, standardize=True, dropout=0.5)
    assert head(torch.randn(8, 6)).shape == (8, 3)
    assert sum(p.numel() for p in head.parameters()) == 6 * 3 + 3
    head.eval()
    features = torch.randn(8, 6)
    assert torch.equal(head(features), head(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_in_single_precision(dtype: torch.dtype) -> None:
    """Half precision counts to a few thousand, then stands still or overflows."""
    layer = Standardize(4).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        layer((2 * torch.randn(64, 4, generator=generator) + 3).to(dtype))
    assert layer.count == 64_000
    assert layer.variance.tolist() == pytest.approx([4] * 4, rel=0.05)
    assert layer(torch.zeros(1, 4, dtype=dtype)).dtype == dtype
    assert layer.to(torch.float64).mean.dtype == torch.float64


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_mlp_head(norm: Literal["none", "batch", "layer"]) -> None:
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


def test_cosine_head_sees_directions_alone() -> None:
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


def test_last_linear_layer_is_resized() -> None:
    head = resize_last_linear(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1000)), 3)
    assert head(torch.zeros(1, 4)).shape == (1, 3)
