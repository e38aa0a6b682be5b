"""A truncated network computes the first stages of the whole one, then a mean."""

import copy
from pathlib import Path

import pytest
import torch

from tests.backbones.test_traced import check_cuts
from tests.doubles import TinyBackbone
from tl_lightning.backbones import TimmBackbone, TorchvisionBackbone, TracedBackbone, TruncatedBackbone
from tl_lightning.modules import LinearProbe, PartialFineTuning
from tl_lightning.modules import checkpoint as checkpoints


def images_for(backbone: TracedBackbone | TruncatedBackbone) -> torch.Tensor:
    shape = (2, 3, *backbone.preprocessing.crop_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_features_are_the_mean_of_the_activations_before_the_stage() -> None:
    whole = TinyBackbone().eval()
    early = TruncatedBackbone(whole, "layer3").eval()
    images = images_for(whole)
    assert early.stages == ("stem", "layer1", "layer2")
    assert early.feature_dim == 16
    assert early.preprocessing == whole.preprocessing
    with torch.no_grad():
        found = whole.split("layer3")[0](images)
        assert torch.equal(early.forward_map(images), found)
        assert torch.equal(early(images), found.mean((2, 3)))


@pytest.mark.parametrize(
    ("whole", "before", "feature_dim"),
    [
        (lambda: TorchvisionBackbone("mobilenet_v2", weights=None, image_size=64), "features.14", 96),
        (lambda: TorchvisionBackbone("vgg11_bn", weights=None, image_size=64), "classifier.3", 4096),
        (lambda: TorchvisionBackbone("swin_t", weights=None, image_size=64), "features.7", 768),  # (N, h, w, C)
        (lambda: TimmBackbone("test_vit", weights=None, image_size=64), "blocks.5", 64),  # (N, T, C)
        (lambda: TimmBackbone("deit_tiny_distilled_patch16_224", weights=None, image_size=64), "blocks.6", 192),
    ],
)
def test_truncation_works_for_maps_tokens_and_vectors(whole: object, before: str, feature_dim: int) -> None:
    backbone = whole()  # type: ignore[operator]
    early = TruncatedBackbone(backbone, before)
    if before.startswith("classifier"):
        early.eval()
        with torch.no_grad():
            assert early(images_for(early)).shape == (2, feature_dim)
        with pytest.raises(ValueError, match="no spatial map"):
            early.forward_map(images_for(early))
    else:
        check_cuts(early, feature_dim)


def test_class_tokens_are_left_out_of_the_mean() -> None:
    backbone = TimmBackbone("deit_tiny_distilled_patch16_224", weights=None, image_size=64).eval()  # two class tokens
    early = TruncatedBackbone(backbone, "blocks.6").eval()
    images = images_for(backbone)
    with torch.no_grad():
        tokens = backbone.split("blocks.6")[0](images)
        torch.testing.assert_close(early(images), tokens[:, 2:].mean(1))


def test_only_the_remaining_stages_can_train() -> None:
    classifier = PartialFineTuning(TruncatedBackbone(TinyBackbone(), "layer3"), 3, unfreeze_from="layer2").train()
    loss = classifier.compute_loss(classifier(images_for(classifier.backbone)), torch.tensor([0, 1]))  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    moved = {name for name, parameter in classifier.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[3] for name in moved if name.startswith("backbone")} == {"layer2"}


def test_a_copy_is_independent() -> None:
    early = TruncatedBackbone(TinyBackbone(), "layer3").eval()
    images = images_for(early)
    with torch.no_grad():
        before = early(images)
        other = copy.deepcopy(early)
        other.backbone.model.stem.conv.weight.zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(early(images), before)
        assert not torch.equal(other(images), before)


def test_checkpoint_rebuilds_it_without_loading_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = LinearProbe(TruncatedBackbone(TinyBackbone(seed=3), "layer2"), 3).eval()
    images = images_for(classifier.backbone)  # type: ignore[arg-type]
    state = classifier.state_dict()
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": state, checkpoints.KEY: checkpoints.describe(classifier, state)}, file)
    seen: list[str | None] = []
    construct = TinyBackbone.__init__

    def watch(self: TinyBackbone, seed: int = 0, weights: str | None = "DEFAULT", dropout: float = 0.3) -> None:
        seen.append(weights)
        construct(self, seed, weights, dropout)

    monkeypatch.setattr(TinyBackbone, "__init__", watch)
    again = LinearProbe.load_from_checkpoint(file)
    assert seen == [None]
    with torch.no_grad():
        assert torch.equal(again(images), classifier(images))


@pytest.mark.parametrize(
    ("before", "message"),
    [("layer9", "did you mean"), ("stem", "nothing comes before"), ("head", "would keep all stages")],
)
def test_stages_that_cannot_end_the_network_are_refused(before: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TruncatedBackbone(TinyBackbone(), before)
