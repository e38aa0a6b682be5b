import torch

from tl_lightning.heads import LinearHead, Standardize


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
