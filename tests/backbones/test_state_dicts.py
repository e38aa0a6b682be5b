"""Prefixes of real families are found, and a file without the right weights is refused with the way out."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.backbones.saved import State, assert_same, load, moved, network, put
from tl_lightning.backbones import EfficientNetLite, TimmBackbone
from tl_lightning.backbones.weights import load_weights_file


@pytest.fixture(scope="module")
def state() -> State:
    saved: State = network().state_dict()
    return saved


def test_whole_modules_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    way = r"In the program that wrote it, .*torch\.save\(model\.state_dict\(\), 'file_weights\.pth'\)"
    with pytest.raises(ValueError, match=f"holds a whole module .*{way}"):
        load(network(), tmp_path / "file.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch deprecate TorchScript
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network()), str(tmp_path / "file.pt"))
    with pytest.raises(ValueError, match=f"TorchScript .*{way}"):
        TimmBackbone("test_resnet", str(tmp_path / "file.pt"))


class Metric:
    pass


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda s: {"state_dict": s, "metric": Metric()},
            r"holds pickled objects \(tests\.\S+\.Metric\), .*state_dict\(\)",
        ),
        (
            lambda s: {"model_a": s, "model_b": moved(s)},
            r"several networks that fit: 'model_a'; 'model_b'\. .*torch\.load\('file\.pth', .*\)\['model_a'\],",
        ),
        (
            lambda s: put("online.", s) | put("target.", moved(s)),
            r"several networks .* the prefix 'online\.'; .* 'target\.'.*if k\.startswith\('online\.'\)\}",
        ),
        (lambda s: put("", s) | put("momentum.", moved(s)), r"several networks .*: the names without a prefix; the"),
        (lambda s: {"ema_a": s, "ema_b": moved(s)}, "several networks that fit"),
        (lambda s: {k: v * 0 for k, v in s.items()}, "no layer of .* has a value below zero"),
        (lambda s: {k: v**2 for k, v in s.items()}, "no layer of .* has a value below zero"),
        (lambda s: {"exp_avg": s}, "holds no weights .*optimizer"),
        (lambda s: {"optimizer": {"exp_avg": s}}, "holds no weights .*optimizer"),
        (lambda s: put("exp_avg.", s), "holds no weights .*optimizer"),
        (lambda s: put("module.", s, n_averaged=torch.tensor(0)), "has averaged no weights yet"),
        (lambda s: {"epoch": 3, "loss": torch.ones(1)}, "does not fit test_resnet"),
        (lambda s: {"epoch": 3}, "holds no weights"),
        (lambda s: [s], "holds no weights"),
        (
            lambda s: s | {"bn1.weight": torch.ones(32, dtype=torch.int8)},
            r"of another type: bn1\.weight is torch\.int8 in ",
        ),
        (lambda s: s | {"bn1.weight": torch.ones(32).to_sparse()}, r"bn1\.weight is torch\.sparse_coo in the file"),
        (lambda s: s | {"bn1.weight": torch.ones(32, device="meta")}, r"bn1\.weight is without values in the file"),
        (
            lambda s: {"model": put("net.", {k: v for k, v in s.items() if k != "bn1.weight"})},
            r"1 missing: bn1\.weight\. .*'model' with the prefix 'net\.'",
        ),
        (
            lambda s: put("net.", s | {"layer9.weight": torch.ones(2)}),
            r"1 not in this network: layer9\.weight",
        ),
    ],
)
def test_files_without_the_right_weights_are_refused(
    write: Callable[[State], Any], message: str, tmp_path: Path, state: State
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(state), tmp_path / "file.pth")


def test_smaller_network_does_not_take_a_part_of_a_larger_one(tmp_path: Path) -> None:
    larger = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1]).state_dict()
    smaller = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    smaller.fc = nn.Identity()
    for prefix in ("", "model."):
        torch.save(put(prefix, larger), tmp_path / "larger.pth")
        with pytest.raises(ValueError, match=r"not in this network: layer1\.1\.conv1\.weight"):
            load_weights_file(smaller, tmp_path / "larger.pth", name="smaller", classifier="fc")


@pytest.mark.parametrize(
    "build",
    [
        lambda classes: timm.create_model("test_vit", num_classes=classes),
        lambda classes: torchvision.models.SwinTransformer(
            [2, 2], 12, [1, 1], [2, 2], [2, 2], num_classes=classes or 3
        ),
    ],
    ids=["vit", "swin"],
)
def test_prefixes_of_other_families_are_found(build: Callable[[int], nn.Module], tmp_path: Path) -> None:
    saved, network = build(7).state_dict(), build(0)
    network.head = nn.Identity()
    for content in (
        put("module.encoder_q.", saved),
        {"teacher": put("backbone.", saved), "student": put("module.backbone.", moved(saved))},
        {"state_dict": put("blocks.0.", saved) | {"blocks.1.weight": torch.ones(2)}},
    ):
        torch.save(content, tmp_path / "file.pth")
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        load_weights_file(network, tmp_path / "file.pth", name="network", classifier="head")
        assert_same(network.state_dict(), saved)
    torch.save({"state_dict": put("model.", saved) | put("criterion.", moved(saved))}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"several networks .*'model\.'.*'criterion\.'"):
        load_weights_file(network, tmp_path / "file.pth", name="network", classifier="head")


def test_both_classifiers_of_a_distilled_network_are_left_out(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    saved = timm.create_model(name, num_classes=7, img_size=32).state_dict()
    torch.save(saved, tmp_path / "file.pth")
    assert_same(TimmBackbone(name, str(tmp_path / "file.pth"), image_size=32).model.state_dict(), saved)


def test_batch_norm_of_a_removed_classifier_is_left_out(tmp_path: Path) -> None:
    """timm's LeViT names ``head.linear`` as its classifier, and has a batch norm beside it."""
    saved = {"conv.weight": torch.randn(3, 3), "head.bn.weight": torch.ones(3), "head.linear.weight": torch.ones(7, 3)}
    torch.save(saved, tmp_path / "file.pth")
    network = nn.Sequential()
    network.add_module("conv", nn.Linear(3, 3, bias=False))
    load_weights_file(network, tmp_path / "file.pth", name="network", classifier=("head.linear", "head_dist.linear"))
    assert torch.equal(network.get_parameter("conv.weight"), saved["conv.weight"])
    network.add_module("head", nn.Sequential())
    network.get_submodule("head").add_module("norm", nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"2 missing: head\.norm\.weight, .*1 not in this network: head\.bn\.weight"):
        load_weights_file(network, tmp_path / "file.pth", name="network", classifier="head.linear")


def test_efficientnet_lite_loads_weights_of_a_lightning_module(tmp_path: Path) -> None:
    saved = timm.create_model("tf_efficientnet_lite0", num_classes=7).state_dict()
    torch.save({"state_dict": put("model.", saved)}, tmp_path / "file.ckpt")
    assert_same(dict(EfficientNetLite(weights=str(tmp_path / "file.ckpt")).model.state_dict()), saved)
