import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tests.doubles import TINY, TinyBackbone, TinyNet
from tl_lightning.backbones import Backbone, TimmBackbone, TorchvisionBackbone, TracedBackbone

TORCHVISION = {
    "resnet18": 512,
    "resnet50": 2048,
    "vgg11_bn": 4096,
    "densenet121": 1024,
    "inception_v3": 2048,
    "googlenet": 1024,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "efficientnet_v2_s": 1280,
    "convnext_tiny": 768,
    "regnet_y_400mf": 440,
    "shufflenet_v2_x1_0": 1024,
    "squeezenet1_0": 512,
    "mnasnet1_0": 1280,
    "alexnet": 4096,
    "vit_b_32": 768,
    "swin_t": 768,
    "maxvit_t": 512,
}
TIMM = {
    "tf_efficientnet_lite0": 1280,
    "resnet26d": 2048,
    "convnextv2_atto": 320,
    "vit_tiny_patch16_224": 192,
    "swin_tiny_patch4_window7_224": 768,
    "mobilenetv4_conv_small": 1280,
    "regnety_002": 368,
    "test_resnet": 96,
    "test_vit": 64,
    "eva02_tiny_patch14_224": 192,  # a constant (rotary embedding) goes to all blocks
    "deit_tiny_distilled_patch16_224": 192,  # two class tokens
}
SIZES: dict[str, int | None] = {
    "alexnet": 128,
    "inception_v3": 128,
    "vit_b_32": None,  # takes images of 224 pixels only, as does the next
    "maxvit_t": None,
    "swin_tiny_patch4_window7_224": 112,
    "eva02_tiny_patch14_224": 84,
}
"""Image sizes that keep a map of several places before the pooling; other networks do so with ``SMALL``."""
SMALL = 64


def check_cuts(backbone: Backbone, feature_dim: int) -> None:
    backbone.eval()
    height, width = backbone.preprocessing.crop_shape
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone(images)
        assert backbone.feature_dim == feature_dim
        assert features.shape == (2, feature_dim)
        assert len(backbone.stages) >= 4
        for stage in backbone.stages:
            prefix, suffix = backbone.split(stage)
            assert torch.equal(suffix(prefix(images)), features), stage
        spatial = backbone.forward_map(images)
    assert spatial.shape[0] == 2
    assert spatial.ndim == 4
    assert min(spatial.shape[2:]) > 1


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_model_is_cut_exactly(name: str) -> None:
    check_cuts(TorchvisionBackbone(name, weights=None, image_size=SIZES.get(name, SMALL)), TORCHVISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_timm_model_is_cut_exactly(name: str) -> None:
    check_cuts(TimmBackbone(name, weights=None, image_size=SIZES.get(name, SMALL)), TIMM[name])


def test_resnet_stages_have_the_usual_names() -> None:
    assert TorchvisionBackbone("resnet50", weights=None, image_size=SMALL).stages == (
        "stem",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    )


def test_vit_blocks_are_stages() -> None:
    expected = ("stem", *(f"blocks.{i}" for i in range(12)))
    assert TimmBackbone("vit_tiny_patch16_224", weights=None, image_size=SMALL).stages == expected


def test_deep_resnet_is_not_cut_into_blocks() -> None:
    assert len(TorchvisionBackbone("resnet152", weights=None, image_size=SMALL).stages) == 5


def test_prefix_and_suffix_list_their_own_parameters_alone() -> None:
    backbone = TorchvisionBackbone("vit_b_32", weights=None)
    prefix, suffix = backbone.split("encoder.layers.encoder_layer_7")
    own = {id(p) for p in backbone.parameters()}
    first, second = ({id(p) for p in part.parameters()} for part in (prefix, suffix))
    assert first | second == own
    assert not first & second
    assert "class_token" in dict(prefix.named_parameters())


def test_map_of_channels_last_network_has_channels_first() -> None:
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", weights=None).eval()
    with torch.no_grad():
        assert backbone.forward_map(torch.zeros(1, 3, 224, 224)).shape == (1, 768, 7, 7)


def test_map_of_tokens_is_row_by_row_without_class_token() -> None:
    backbone = TimmBackbone("test_vit", weights=None).eval()
    net = backbone.model
    assert isinstance(net, VisionTransformer)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        tokens = net.forward_features(images)
        spatial = backbone.forward_map(images)
    assert torch.equal(spatial[0, :, 2, 3], tokens[0, 1 + 2 * 10 + 3])


class Branching(nn.Module):
    """Two parallel branches up to the end, so that two tensors are always alive."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3) for i in range(4))
        self.right = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3) for i in range(4))

    def forward(self, images: Tensor) -> Tensor:
        a = b = images
        for left, right in zip(self.left, self.right, strict=True):
            a, b = left(a) + 0 * right(b).mean(), right(b)
        return (a + b).mean((2, 3))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, images: Tensor) -> Tensor:
        scale = 2 if images.sum() > 0 else 1
        features: Tensor = scale * self.conv(images).mean((2, 3))
        return features


@pytest.mark.parametrize("net", [Branching(), DataDependent()])
def test_network_that_cannot_be_cut_works_as_a_whole_and_says_why(net: nn.Module) -> None:
    backbone = TracedBackbone(net, "oddnet", TINY).eval()
    images = torch.randn(2, 3, 16, 16)
    assert backbone.stages == ("stem",)
    prefix, suffix = backbone.split("stem")
    assert torch.equal(suffix(prefix(images)), net(images))
    with pytest.raises(ValueError, match="oddnet works only as a whole"):
        backbone.split("layer4")


def test_unknown_stage_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown stage 'layer5'; did you mean 'layer.*resnet18 has stem, layer1"):
        TorchvisionBackbone("resnet18", weights=None, image_size=SMALL).split("layer5")


def test_network_without_pooled_output_is_refused() -> None:
    with pytest.raises(ValueError, match=r"into \(2, 8, 14, 14\); a backbone returns \(N, D\)"):
        TracedBackbone(nn.Conv2d(3, 8, 3), "conv", TINY)


def test_suffix_follows_the_mode_of_the_network() -> None:
    """Functional dropout in the outermost forward reads ``self.training``, and a trace bakes its value in."""
    backbone = TinyBackbone().eval()
    images = torch.randn(4, 3, 16, 16)
    _, suffix = backbone.split("layer3")
    prefix, _ = backbone.split("layer3")
    inputs = prefix(images)
    assert torch.equal(suffix(inputs), suffix(inputs))
    for module in suffix.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    suffix.train()
    assert (suffix(inputs) == 0).any(), "dropout after the pooling is off in train mode"
    assert torch.equal(prefix(images), inputs), "the prefix is still in eval mode"


def test_gradients_reach_the_suffix_only() -> None:
    backbone = TinyBackbone().eval()
    prefix, suffix = backbone.split("layer2")
    with torch.no_grad():
        inputs = prefix(torch.randn(4, 3, 16, 16))
    suffix(inputs).sum().backward()
    moved = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in backbone.named_parameters() if ".layer2" in name or ".layer3" in name}


def test_segments_follow_moves_copies_and_pickles() -> None:
    backbone = TinyBackbone().eval()
    images = torch.randn(2, 3, 16, 16)
    backbone.split("layer1")
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):  # noqa: S301 - our own bytes
        prefix, suffix = other.split("layer1")
        assert torch.equal(suffix(prefix(images)), backbone(images))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in backbone.parameters()}
    prefix, suffix = backbone.split("layer1")
    backbone.double()
    assert torch.equal(suffix(prefix(images.double())), backbone(images.double()))


def test_parameter_names_are_the_networks_own() -> None:
    assert set(TinyBackbone().model.state_dict()) == set(TinyNet().state_dict())
