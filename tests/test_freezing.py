from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.doubles import TINY, TinyBackbone
from tests.staged import classifier, images, trainer
from tl_lightning.backbones import Backbone, TimmBackbone, TorchvisionBackbone, TracedBackbone
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.freezing import HEAD, FreezePolicy
from tl_lightning.utils.hashing import fingerprints

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "tiny": TinyBackbone,
    "resnet": lambda: TorchvisionBackbone("resnet18", weights=None),
    "inception": lambda: TorchvisionBackbone("inception_v3", weights=None),
    "vit": lambda: TimmBackbone("test_vit", weights=None),
    "convnext": lambda: TimmBackbone("test_convnext", weights=None),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_each_parameter_belongs_to_exactly_one_stage(kind: str) -> None:
    backbone = BACKBONES[kind]()
    freeze_policy = FreezePolicy(backbone, backbone.stages[0])
    owned = [name for stage in freeze_policy.stages.values() for name in stage.parameters]
    assert len(owned) == len(set(owned))
    auxiliary = {name for name, _ in backbone.named_parameters() if name.startswith("auxiliary.")}
    assert set(owned) == {name for name, _ in backbone.named_parameters()} - auxiliary
    assert freeze_policy.unfreezable == backbone.stages


@pytest.mark.parametrize("kind", BACKBONES)
def test_frozen_stages_require_no_gradient_and_are_in_eval_mode(kind: str) -> None:
    backbone = BACKBONES[kind]()
    first = backbone.stages[-2]
    freeze_policy = FreezePolicy(backbone, first)
    freeze_policy.unfreeze_only(freeze_policy.stages_from(first))
    backbone.train()
    freeze_policy.freeze()
    prefix, suffix = backbone.split(first)
    assert not any(p.requires_grad for p in prefix.parameters())
    assert all(p.requires_grad for p in suffix.parameters())
    live = {id(module) for module in backbone.modules()}
    assert not any(module.training for module in prefix.modules() if id(module) in live)
    for module in suffix.modules():
        if id(module) in live:
            assert module.training is not isinstance(module, nn.BatchNorm2d)
    freeze_policy.freeze(training=False)
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("train_bn", [False, True])
def test_batch_norm_statistics_move_only_with_train_bn(train_bn: bool) -> None:
    backbone = TinyBackbone()
    freeze_policy = FreezePolicy(backbone, "layer2", train_bn=train_bn)
    freeze_policy.unfreeze_only(freeze_policy.stages_from("layer2"))
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    prefix, suffix = backbone.split("layer2")
    suffix(prefix(torch.randn(8, 3, 16, 16))).sum().backward()
    moved = {name.split(".")[1] for name, buffer in backbone.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == ({"layer2", "layer3"} if train_bn else set())
    assert all(parameter.grad is not None for parameter in suffix.parameters()), "scale and shift train in both cases"
    assert {name for name in freeze_policy.frozen_tensors() if "running" in name and "layer3" in name} == (
        set() if train_bn else {"model.layer3.norm.running_mean", "model.layer3.norm.running_var"}
    )


class Unfreeze(pl.Callback):
    """Make the whole backbone require gradients in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, pl_module, *args: pl_module.backbone.requires_grad_(True))


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start", "on_validation_end"]
)
def test_stages_that_a_callback_unfreezes_stay_frozen(hook: str, photos: Path, tmp_path: Path) -> None:
    model = classifier(unfreeze_from="layer2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(tmp_path, Unfreeze(hook), StagedUnfreezing({1: "layer3"}), max_epochs=2).fit(model, images(photos))
    moved = {name.split(".")[2] for name, tensor in model.backbone.state_dict(prefix="backbone.").items()
             if not torch.equal(tensor, before[name])}  # fmt: skip
    assert moved == {"layer3"}


def test_freezing_drops_gradients() -> None:
    backbone = TinyBackbone()
    freeze_policy = FreezePolicy(backbone, "layer1")
    freeze_policy.unfreeze_only(freeze_policy.stages_from("layer1"))
    backbone(torch.randn(2, 3, 16, 16)).sum().backward()
    freeze_policy.unfreeze_only(freeze_policy.stages_from("layer3"))
    assert {n.split(".")[1] for n, p in backbone.named_parameters() if p.grad is not None} == {"layer3"}


@pytest.mark.parametrize("given", ["layer4.1", "model.layer4.1", "layer4.1.conv1.weight"])
def test_training_can_start_at_a_module_or_parameter_inside_a_stage(given: str) -> None:
    backbone = TorchvisionBackbone("resnet18", weights=None)
    freeze_policy = FreezePolicy(backbone, given)
    assert freeze_policy.boundary == "layer4"
    assert freeze_policy.unfreezable == (given,)
    freeze_policy.unfreeze_only(freeze_policy.stages_from(given))
    moving = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert moving == {name for name, _ in backbone.named_parameters() if name.startswith("model.layer4.1.")}
    backbone.train()
    freeze_policy.freeze()
    assert not any(module.training for module in backbone.get_submodule("model.layer4.0").modules())
    assert backbone.get_submodule("model.layer4.1.conv1").training


def test_stages_are_counted_from_the_last() -> None:
    backbone = TorchvisionBackbone("resnet18", weights=None)
    assert FreezePolicy(backbone, 2).unfreezable == ("layer3", "layer4"), "stages, not tensors or modules"
    assert FreezePolicy(backbone, 5).unfreezable == backbone.stages
    assert FreezePolicy(backbone, HEAD).unfreezable == ()
    with pytest.raises(ValueError, match="the last 6 stages are asked for, but resnet18 has 5: stem, layer1"):
        FreezePolicy(backbone, 6)
    with pytest.raises(ValueError, match="unknown stage 'layer5'; did you mean 'layer4'"):
        FreezePolicy(backbone, "layer5")
    with pytest.raises(ValueError, match="'relu' of resnet18 holds no parameter"):
        FreezePolicy(backbone, "relu")


class Tied(nn.Module):
    """The last stage shares the weights of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1, self.layer2, self.layer3 = (nn.Conv2d(4, 4, 3) for _ in range(3))
        self.layer3.weight = self.layer1.weight

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return features.mean((2, 3))


def test_shared_parameter_trains_with_the_first_stage_that_uses_it() -> None:
    backbone = TracedBackbone(Tied(), "tied", TINY)
    freeze_policy = FreezePolicy(backbone, "layer2")
    freeze_policy.unfreeze_only(freeze_policy.stages_from("layer2"))
    assert not backbone.get_parameter("model.layer1.weight").requires_grad, "a frozen stage would move"
    freeze_policy = FreezePolicy(backbone, "layer1")
    freeze_policy.unfreeze_only(freeze_policy.stages_from("layer1"))
    assert backbone.get_parameter("model.layer1.weight").requires_grad
    assert [name for s in freeze_policy.stages.values() for name in s.parameters].count("model.layer1.weight") == 1


def test_functional_dropout_is_off_in_a_frozen_stage_of_the_suffix() -> None:
    """Functional dropout between modules follows its stage, and not the mode of the network."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer1, self.layer2, self.layer3 = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, images: Tensor) -> Tensor:
            for layer in (self.stem, self.layer1):
                images = nn.functional.dropout(layer(images), 0.5, self.training)
            features: Tensor = self.layer3(nn.functional.dropout(self.layer2(images), 0.5, self.training))
            return features.mean((2, 3))

    backbone = TracedBackbone(Functional(), "functional", TINY)
    freeze_policy = FreezePolicy(backbone, "layer1")
    freeze_policy.unfreeze_only(("layer2", "layer3"))
    images = torch.randn(4, 3, 16, 16)
    inside: list[Tensor] = []
    backbone.get_submodule("model.layer2").register_forward_pre_hook(lambda m, inputs: inside.append(inputs[0]))
    prefix, suffix = backbone.split("layer1")
    outputs = [suffix(prefix(images)) for _ in range(2)]
    assert torch.equal(inside[0], inside[1]), "a frozen stage drops out"
    assert not torch.equal(*outputs), "a stage that trains does not"


def test_fingerprints_differ_for_any_change_of_bits() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(6), "c": torch.zeros(6, dtype=torch.bfloat16)}
    found = fingerprints(tensors)
    assert len(set(found.values())) == 3
    tensors["b"][3] = -0.0  # an equal value with other bits
    assert {name for name, digest in fingerprints(tensors).items() if digest != found[name]} == {"b"}
