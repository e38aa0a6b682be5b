"""Partial fine-tuning trains the chosen stages and nothing else, each at its own learning rate."""

import functools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from tests.doubles import TinyBackbone, image_folder
from tests.staged import classifier, images, trainer
from tl_lightning.backbones import Backbone, TimmBackbone, TorchvisionBackbone
from tl_lightning.batch import Batch
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.heads import CosineHead, MLPHead
from tl_lightning.modules import LinearProbe, PartialFineTuning, TransferClassifier
from tl_lightning.utils.hashing import fingerprint


def groups_of(model: TransferClassifier) -> dict[str, list[str]]:
    """Return the parameter names of each group, and check that no parameter is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = model.parameter_groups()
    found = {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}
    grouped = [name for members in found.values() for name in members]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    return found


def rates(model: TransferClassifier) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in model.parameter_groups() if not group["name"].endswith("_no_decay")}


# Parameter groups -----------------------------------------------------------------------------------------------------


def test_learning_rates_fall_from_the_head_to_the_deepest_stage() -> None:
    model = classifier(lr=1e-2, backbone_lr=1e-3, layer_decay=0.5)
    expected = {"head": 1e-2, "layer3": 1e-3, "layer2": 5e-4, "layer1": 2.5e-4}
    assert rates(model) == pytest.approx(expected)
    assert rates(PartialFineTuning(TinyBackbone(), 3, 1, lr=1e-3)) == pytest.approx({"head": 1e-3, "layer3": 1e-4})


def test_scales_and_biases_have_no_weight_decay() -> None:
    for group in classifier().parameter_groups():
        for parameter in group["params"]:
            assert (parameter.ndim < 2) == (group.get("weight_decay") == 0.0)


def test_unfreezing_from_the_first_stage_trains_the_whole_network() -> None:
    model = PartialFineTuning(TinyBackbone(), 3, unfreeze_from="stem")
    assert all(p.requires_grad for p in model.parameters())
    assert {name for members in groups_of(model).values() for name in members} == dict(model.named_parameters()).keys()


class NormedHead(nn.Module):
    """Use new norm layers and zero biases, which are equal in value to those of other layers."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features)
        self.again = nn.BatchNorm1d(in_features)
        self.layer_norm = nn.LayerNorm(in_features)
        self.linear = nn.Linear(in_features, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.layer_norm(self.norm(features) + self.again(features)))
        return logits


def fit(model: TransferClassifier, tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> dict[str, Tensor]:
    """Fit on a few small images, and return the parameters and buffers from before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [f"class {number}" for number in range(model.num_classes)]
    root = image_folder(tmp_path / "photos", dict.fromkeys(names, 6))
    preprocessing = model.backbone.preprocessing
    data = ImageFolderDataModule(str(root), batch_size=8, num_workers=0, preprocessing=preprocessing)
    limits = {"limit_train_batches": 2, "limit_val_batches": 1}
    trainer(tmp_path, *callbacks, **({"max_epochs": 1} | limits | options)).fit(model, data)
    return before


def moved(model: TransferClassifier, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def small(name: str) -> Backbone:
    """Build a torchvision backbone for small images, which makes tests fast."""
    backbone = TorchvisionBackbone(name, weights=None)
    backbone.preprocessing = backbone.preprocessing._replace(size=40, crop=32)
    return backbone


def test_parameters_of_equal_value_all_train(tmp_path: Path) -> None:
    """Lightning's BaseFinetuning compares parameters by value, and leaves 10 of 60 tensors out."""
    model = PartialFineTuning(small("resnet18"), 3, unfreeze_from="stem", head=NormedHead, lr=0.01)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouped = {name for members in groups_of(model).values() for name in members}
    assert grouped == trainable
    assert len(trainable) == 60 + 8
    before = fit(model, tmp_path)
    assert moved(model, before) == trainable


def test_users_optimizer_keeps_its_own_weight_decay() -> None:
    model = classifier(optimizer=torch.optim.SGD)
    from tl_lightning.optim import build_optimizer

    optimizer = build_optimizer(model.parameter_groups(), model.optimizer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert [group["lr"] for group in optimizer.param_groups[::2]] == pytest.approx([0.01, 0.005, 0.00375, 0.0028125])


# Batch norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_bn", [False, True])
def test_batch_norm_statistics_of_unfrozen_stages_move_only_with_train_bn(
    train_bn: bool, photos: Path, tmp_path: Path
) -> None:
    model = classifier(unfreeze_from="layer2", train_bn=train_bn)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer(tmp_path, max_epochs=1).fit(model, images(photos))
    changed = {
        name.split(".")[2]
        for name, b in model.named_buffers()
        if "running" in name and not torch.equal(b, before[name])
    }
    assert changed == ({"layer2", "layer3"} if train_bn else set())


# Auxiliary heads ------------------------------------------------------------------------------------------------------


def inception(name: str) -> TorchvisionBackbone:
    backbone = TorchvisionBackbone(name, weights=None)
    size = 299 if name == "inception_v3" else 224
    backbone.preprocessing = backbone.preprocessing._replace(size=size, crop=size)
    return backbone


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("inception_v3", "Mixed_6e", {"AuxLogits": 0.4}),
        ("inception_v3", "Mixed_7a", {}),
        ("googlenet", "inception3a", {"aux1": 0.3, "aux2": 0.3}),
        ("googlenet", "inception4d", {"aux2": 0.3}),
        ("googlenet", "inception5a", {}),
    ],
)
def test_auxiliary_heads_exist_where_their_stage_may_train(name: str, first: str, expected: dict[str, float]) -> None:
    backbone = inception(name)
    model = PartialFineTuning(backbone, 10, unfreeze_from=first)
    assert set(model.auxiliary_heads) == set(expected)
    model.train()
    batch = Batch(torch.randn(2, 3, *backbone.preprocessing.crop_shape), torch.tensor([3, 7]), torch.arange(2), None)
    losses: list[Tensor] = []

    def constant_loss(logits: Tensor, target: Tensor) -> Tensor:
        losses.append(logits)
        return 1 + 0 * logits.sum()

    model.compute_loss = constant_loss  # type: ignore[method-assign]  # leaves only the loss weights
    loss = model.training_loss(batch)
    assert float(loss.detach()) == pytest.approx(1 + sum(expected.values()))
    assert [tuple(logits.shape) for logits in losses] == [(2, 10)] * (1 + len(expected))
    loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    for head in model.auxiliary_heads.values():
        assert all(parameter.grad is not None for parameter in head.parameters())
    model.eval()
    losses.clear()
    with torch.no_grad():
        model.training_loss(batch)
    assert len(losses) == 1, "the auxiliary heads ran in evaluation"


def test_auxiliary_head_trains_only_once_its_stage_is_unfrozen(tmp_path: Path) -> None:
    model = PartialFineTuning(inception("googlenet"), 2, unfreeze_from="inception4d", lr=0.01)
    before = fit(model, tmp_path, StagedUnfreezing({1: "inception5a"}), max_epochs=2)
    assert not any(name.startswith("auxiliary_heads") for name in moved(model, before))
    model = PartialFineTuning(inception("googlenet"), 2, unfreeze_from="inception4d", lr=0.01)
    before = fit(model, tmp_path, StagedUnfreezing({1: "inception4d"}), max_epochs=2)
    assert any(name.startswith("auxiliary_heads") for name in moved(model, before))
    assert "auxiliary_heads.aux2.fc2.weight" in groups_of(model)["head"]


# Heads and checkpoints ------------------------------------------------------------------------------------------------


def test_users_head_is_restored_from_its_checkpoint(photos: Path, tmp_path: Path) -> None:
    head = functools.partial(MLPHead, hidden=[7], dropout=0.5)
    model = classifier(head=head, unfreeze_from=2)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, images(photos))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PartialFineTuning.load_from_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(again.head, MLPHead)
    assert again.freeze_policy.unfreezable == ("layer2", "layer3")
    pictures = torch.randn(3, 3, 16, 16)
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(pictures), model(pictures))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze_from": "head"}, "nothing of the backbone would train: use LinearProbe"),
        ({"unfreeze_from": 0}, "nothing of the backbone would train: use LinearProbe"),
        ({"unfreeze_from": "layer7"}, "unknown stage 'layer7'; did you mean"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"backbone_lr": 0.0}, "backbone_lr is 0.0"),
        ({"backbone_lr": math.inf}, "backbone_lr is inf"),
        ({"lr": -0.01}, "lr is -0.01; it must be above 0"),
        ({"lr": math.nan}, "lr is nan; it must be above 0"),
        ({"unfreeze_from": "0"}, "nothing of the backbone would train: use LinearProbe"),
        ({"head": MLPHead(24, 3)}, "head is an object of MLPHead; give a class, as MLPHead"),
        ({"head": "MLPHead"}, "head is 'MLPHead'; give a class"),
        (
            {"head": lambda features, classes: nn.Linear(features, classes)},
            "lambda.*cannot be written into a checkpoint",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_activations_from_before_the_trainable_stages_are_refused() -> None:
    model = classifier(unfreeze_from="layer2").eval()
    prefix, _ = model.backbone.split("layer1")
    with pytest.raises(
        ValueError, match="activations of the boundary 'layer1' are given, but training starts at 'layer2'"
    ):
        model.forward_from(prefix(torch.randn(2, 3, 16, 16)), "layer1")


@pytest.mark.parametrize("first", ["stem", "layer2"])
def test_forward_from_any_trainable_boundary_gives_the_same_logits(first: str) -> None:
    model = classifier(unfreeze_from=first, head=CosineHead).eval()
    pictures = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(pictures)
        for stage in model.freeze_policy.unfreezable:
            inputs = model.backbone.split(stage)[0](pictures)
            assert torch.equal(model.forward_from(inputs, stage), expected)
        assert torch.equal(model.forward_from(model.backbone(pictures), "head"), expected)


# Classic recipes, each with a mistake that is common in them ----------------------------------------------------------


def stages_of(names: set[str]) -> set[str]:
    return {name.split(".")[2] if name.startswith("backbone.") else name.split(".")[0] for name in names}


RESNET = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def test_resnet18_probe_with_adam_trains_only_the_head(tmp_path: Path) -> None:
    model = LinearProbe(small("resnet18"), 3, lr=1e-3, optimizer=torch.optim.Adam)
    assert stages_of(moved(model, fit(model, tmp_path))) == {"head"}


def test_resnet18_with_sgd_trains_all_stages_at_one_learning_rate(tmp_path: Path) -> None:
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    model = PartialFineTuning(small("resnet18"), 3, "stem", lr=1e-3, backbone_lr=1e-3, layer_decay=1.0, optimizer=sgd)
    assert set(rates(model).values()) == {1e-3}
    assert stages_of(moved(model, fit(model, tmp_path))) == RESNET | {"head"}


def test_resnet50_trains_its_late_stages_only_after_the_probe(tmp_path: Path) -> None:
    model = PartialFineTuning(small("resnet50"), 2, "layer3", lr=1e-3, backbone_lr=1e-5)
    before = fit(model, tmp_path, StagedUnfreezing({1: "layer3"}), max_epochs=1)
    assert stages_of(moved(model, before)) == {"head"}
    before = fit(model, tmp_path, StagedUnfreezing({1: "layer3"}), max_epochs=2)
    assert stages_of(moved(model, before)) == {"head", "layer3", "layer4"}


def test_resnet34_trains_head_and_backbone_at_two_learning_rates(tmp_path: Path) -> None:
    model = PartialFineTuning(small("resnet34"), 3, "stem", lr=1e-2, backbone_lr=1e-3, layer_decay=1.0)
    assert rates(model) == {"head": 1e-2} | dict.fromkeys(["layer4", "layer3", "layer2", "layer1", "stem"], 1e-3)
    assert stages_of(moved(model, fit(model, tmp_path))) == RESNET | {"head"}


@pytest.mark.filterwarnings("ignore:val_loss is nan")  # random weights make the gradients huge
def test_inception_trains_its_late_stages_and_its_auxiliary_head(tmp_path: Path) -> None:
    model = PartialFineTuning(
        inception("inception_v3"), 10, "Mixed_6e", lr=1e-4, backbone_lr=1e-4, layer_decay=1.0, optimizer=torch.optim.SGD
    )
    before = fit(model, tmp_path, limit_train_batches=1)
    late = {"Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"}
    assert stages_of(moved(model, before)) == late | {"head", "auxiliary_heads"}


def test_resnet18_trains_its_last_stage_and_an_mlp_head(tmp_path: Path) -> None:
    head = functools.partial(MLPHead, hidden=[256])
    model = PartialFineTuning(small("resnet18"), 10, "layer4", head=head, lr=0.01)
    linear = [module for module in model.head.modules() if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 256), (256, 10)]
    assert stages_of(moved(model, fit(model, tmp_path))) == {"layer4", "head"}


def test_unfreezing_from_1_trains_the_whole_last_stage_of_resnet18(tmp_path: Path) -> None:
    model = PartialFineTuning(small("resnet18"), 3, unfreeze_from=1, lr=0.01)
    assert stages_of(moved(model, fit(model, tmp_path))) == {"layer4", "head"}, (
        "1 means the last stage, not the last tensor"
    )


def test_number_of_stages_may_be_a_string() -> None:
    """A command line passes strings only."""
    assert (
        classifier(unfreeze_from="2").freeze_policy.unfreezable == classifier(unfreeze_from=2).freeze_policy.unfreezable
    )


def test_backbone_stage_named_head_is_not_the_head_of_the_classifier() -> None:
    backbone = TimmBackbone("test_mambaout", weights=None)
    assert backbone.stages[-1] == "model.head"
    model = PartialFineTuning(backbone, 2, unfreeze_from=1, lr=0.5)
    groups = {id(p): group["lr"] for group in model.parameter_groups() for p in group["params"]}
    assert {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad} == {
        name: 0.5 if name.startswith("head.") else 0.05
        for name, _ in model.named_parameters()
        if name.startswith(("head.", "backbone.model.head."))
    }

    backbone.stages = (*backbone.stages[:-1], "head")
    with pytest.raises(ValueError, match="is called 'head', which is reserved for the classifier"):
        LinearProbe(backbone, 2)


def test_learning_rate_of_the_backbone_follows_that_of_the_head() -> None:
    model = classifier(lr=0.1, backbone_lr=None, layer_decay=1.0)
    assert model.learning_rates()["layer3"] == pytest.approx(0.01)
    model.lr = 0.5  # as Lightning's tuner does
    assert model.learning_rates()["layer3"] == pytest.approx(0.05)


class OmitsFirstGroup(PartialFineTuning):
    def parameter_groups(self) -> list[dict[str, Any]]:
        return super().parameter_groups()[1:]


def test_trainable_parameter_in_no_group_is_refused(photos: Path, tmp_path: Path) -> None:
    model = OmitsFirstGroup(TinyBackbone(), 3, unfreeze_from="layer3")
    with pytest.raises(ValueError, match=r"head.linear.weight shall train but is in no group.*of OmitsFirstGroup"):
        trainer(tmp_path).fit(model, images(photos))


def test_optimizer_that_loses_the_learning_rates_is_refused(photos: Path, tmp_path: Path) -> None:
    def without_groups(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for group in groups for parameter in group["params"]])

    with pytest.raises(ValueError, match="SGD was built without the learning rates of the parameter groups"):
        trainer(tmp_path).fit(classifier(optimizer=without_groups), images(photos))


def test_callbacks_that_conflict_with_the_classifier_are_refused(photos: Path, tmp_path: Path) -> None:
    for callback, message in (
        (StochasticWeightAveraging(1e-3), "use tl_lightning.callbacks.EMA"),
        (GradientAccumulationScheduler({0: 2}), r"give trainer.accumulate_grad_batches"),
        (LearningRateFinder(), r"compare rates on held-out images by tl-lightning sweep"),
        (BatchSizeFinder(), r"call lightning.pytorch.tuner.Tuner\(trainer\).scale_batch_size\(model"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callback).fit(classifier(), images(photos))


def test_resuming_with_other_stages_optimizer_or_length_is_reported(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(classifier(unfreeze_from="layer3"), images(photos))
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)

    def resume(**options: Any) -> None:
        model = classifier(**({"unfreeze_from": "layer3"} | options))
        trainer(tmp_path, max_epochs=2).fit(model, images(photos), ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    with pytest.raises(
        ValueError, match="resumed run may train head, layer3, but this one may train head, layer3, layer2: resume with"
    ):
        resume(unfreeze_from="layer2")
    with pytest.raises(ValueError, match="had another optimizer: its state lacks dampening, momentum, which SGD needs"):
        resume(optimizer=torch.optim.SGD)
    with pytest.warns(UserWarning, match="followed a schedule of 3 steps before, and now follow one of 6"):
        resume()


class StartsAtTheStem(PartialFineTuning):
    def stages_from(self, stage: str | int) -> list[str]:
        return ["stem", "layer3"] if stage == "layer3" else list(super().stages_from(stage))


def test_stages_from_that_gives_a_forbidden_stage_is_refused(photos: Path, tmp_path: Path) -> None:
    model = StartsAtTheStem(TinyBackbone(), 3, unfreeze_from="layer2")
    with pytest.raises(
        ValueError, match=r"stages_from\('layer3'\) of StartsAtTheStem gives stem, but only layer2, layer3 may train"
    ):
        trainer(tmp_path, StagedUnfreezing({1: "layer3"})).fit(model, images(photos))


def test_optimizer_that_accepts_no_groups_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be built: LBFGS doesn't support per-parameter"):
        trainer(tmp_path).fit(classifier(optimizer=torch.optim.LBFGS), images(photos))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.Rprop, torch.optim.Adagrad])
def test_run_resumed_with_any_optimizer_ends_with_the_same_bits(optimizer: Any, photos: Path, tmp_path: Path) -> None:
    whole = classifier(optimizer=optimizer)
    trainer(tmp_path, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
            max_epochs=3, enable_checkpointing=True).fit(whole, images(photos))  # fmt: skip
    again = classifier(optimizer=optimizer)
    trainer(tmp_path, max_epochs=3).fit(again, images(photos), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert fingerprint(again.state_dict()) == fingerprint(whole.state_dict())


def test_used_learning_rates_are_logged(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(classifier(scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.5, 9)), images(photos))
    assert float(run.callback_metrics["lr-head"]) == pytest.approx(0.005)
    assert float(run.callback_metrics["lr-layer3"]) == pytest.approx(0.0025)
