import pytest
import torch

from tl_lightning.heads import Standardize


def test_statistics_are_those_of_all_batches_so_far() -> None:
    layer = Standardize(5).double().train()
    features = torch.randn(97, 5, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3, 1]) + torch.tensor(
        [0, 50, -3, 1, 9]
    )
    for batch in torch.split(features, [32, 1, 40, 24]):
        layer(batch)
    assert torch.allclose(layer.mean, features.mean(0), atol=1e-12)
    assert torch.allclose(layer.variance, features.var(0, correction=0), rtol=1e-12)
    assert int(layer.count) == 97


def test_variance_is_accurate_around_a_large_mean() -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_half_precision_head_are_in_single_precision(dtype: torch.dtype) -> None:
    """Half precision counts to a few thousand, then stops or overflows."""
    layer = Standardize(4).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        layer((2 * torch.randn(64, 4, generator=generator) + 3).to(dtype))
    assert layer.count == 64_000
    assert layer.variance.tolist() == pytest.approx([4] * 4, rel=0.05)
    assert layer(torch.zeros(1, 4, dtype=dtype)).dtype == dtype
    assert layer.to(torch.float64).mean.dtype == torch.float64
