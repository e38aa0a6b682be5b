"""Weights as other training programs save them: each file loads the right tensors, or is refused with a way out."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from tl_lightning.backbones import EfficientNetLite, TimmBackbone
from tl_lightning.backbones.weights import is_path, load_weights_file

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", num_classes=7)
    return network


@pytest.fixture(scope="module")
def state(net: nn.Module) -> State:
    saved: State = net.state_dict()
    return saved


def put(prefix: str, state: State, **more: Any) -> dict[str, Any]:
    return more | {prefix + name: tensor for name, tensor in state.items()}


def moved(state: State, by: float = 1.0) -> State:
    return {name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def optimizer(net: nn.Module) -> dict[str, Any]:
    stepped = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    return stepped | {"state": {0: {"momentum_buffer": torch.ones(3)}}}


def load(content: Any, path: Path, network: nn.Module | None = None) -> State:
    """Save a file, and load it into a network without a classifier, whose parameters were zero."""
    torch.save(content, path)
    network = timm.create_model("test_resnet", num_classes=0) if network is None else network
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    load_weights_file(network, path, name="test_resnet", classifier="fc")
    return dict(network.state_dict())


def assert_same(loaded: State, expected: State) -> None:
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


ARGS = argparse.Namespace(lr=0.1, model="resnet18", output=Path("runs"))

# As torchvision's and PyTorch's reference scripts, timm, Lightning, MoCo and torch's own wrappers save one network.
KINDS: dict[str, tuple[Callable[[State, nn.Module], Any], str]] = {
    "plain": (lambda s, n: s, ""),
    "data_parallel": (lambda s, n: put("module.", s), "without the prefix 'module.'"),
    "torchvision_reference": (
        lambda s, n: {"model": s, "optimizer": optimizer(n), "epoch": 3, "args": ARGS},
        "took 'model'",
    ),
    "torchvision_reference_ema": (
        lambda s, n: {
            "model": put("module.", moved(s)),
            "model_ema": put("module.", s, n_averaged=torch.tensor(5)),
            "args": ARGS,
        },
        "took 'model_ema' (the average, not 'model' with the prefix 'module.') of file.pth, without the prefix",
    ),
    "imagenet_example": (
        lambda s, n: {
            "epoch": 3,
            "arch": "x",
            "state_dict": put("module.", s),
            "best_acc1": torch.tensor(7.0),
            "optimizer": optimizer(n),
        },
        "took 'state_dict' of file.pth, without the prefix 'module.'",
    ),
    "imagenet_example_numpy": (
        lambda s, n: {"epoch": 3, "state_dict": s, "best_acc1": np.float64(71.5)},
        "took 'state_dict'",
    ),
    "timm_train": (lambda s, n: {"state_dict": s, "args": ARGS, "metric": np.float32(71.5)}, "took 'state_dict'"),
    "timm_train_ema": (
        lambda s, n: {"epoch": 3, "state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
        "took 'state_dict_ema' (the average, not 'state_dict')",
    ),
    "lightning_model": (
        lambda s, n: {
            "state_dict": put("model.", s, **{"criterion.weight": torch.ones(7)}),
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [optimizer(n)],
        },
        "took 'state_dict' of file.pth, without the prefix 'model.'; left out 1 tensor beside it: criterion.weight",
    ),
    "lightning_backbone": (lambda s, n: {"state_dict": put("backbone.", s)}, "without the prefix 'backbone.'"),
    "lightning_module_ddp": (lambda s, n: {"state_dict": put("model.module.", s)}, "the prefix 'model.module.'"),
    "compiled": (lambda s, n: put("_orig_mod.", s), "the prefix '_orig_mod.'"),
    "lightning_compiled": (lambda s, n: {"state_dict": put("model._orig_mod.", s)}, "the prefix 'model._orig_mod.'"),
    "averaged_model": (lambda s, n: put("module.", s, n_averaged=torch.tensor(3)), "(the average) of file.pth"),
    "net_key": (lambda s, n: {"net": s, "acc": 91.2, "epoch": 3}, "took 'net' of file.pth"),
    "model_state_dict": (
        lambda s, n: {"model_state_dict": s, "optimizer_state_dict": optimizer(n), "loss": 0.1},
        "took 'model_state_dict'",
    ),
    "half": (lambda s, n: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, ""),
    "mocov2": (
        lambda s, n: {"state_dict": put("module.encoder_q.", s, **{"module.queue": torch.ones(2)})},
        "the prefix 'module.encoder_q.'; left out 1 tensor beside it: module.queue",
    ),
    # Beyond the list: wrappers inside the names, a nested dict, and students, teachers and averages side by side.
    "wrapped_inside": (
        lambda s, n: put("", {k.replace("layer1.", "layer1.module."): v for k, v in s.items()}),
        "without 'module.' in its names",
    ),
    "nested": (lambda s, n: {"checkpoint": {"generator": s, "step": 3}}, "took 'checkpoint.generator'"),
    "lightning_averaging": (
        lambda s, n: {"state_dict": put("model.", s), "current_model_state": put("model.", moved(s))},
        "took 'state_dict' (not 'current_model_state' with the prefix 'model.': Lightning's WeightAveraging saves",
    ),
    "lightning_ema": (
        lambda s, n: {"state_dict": put("model.", moved(s)) | put("ema_model.module.", s)},
        "took 'state_dict' (the average, not 'state_dict' with the prefix 'model.') of file.pth, without the prefix",
    ),
    "mocov2_both": (
        lambda s, n: {"state_dict": put("module.encoder_q.", s) | put("module.encoder_k.", moved(s))},
        "(not 'state_dict' with the prefix 'module.encoder_k.': MoCo",
    ),
    "mocov3": (
        lambda s, n: {"state_dict": put("module.base_encoder.", s) | put("module.momentum_encoder.", moved(s))},
        "'module.base_encoder.'",
    ),
    "dino": (
        lambda s, n: {"student": put("module.backbone.", moved(s)), "teacher": put("backbone.", s), "args": ARGS},
        "took 'teacher' (not 'student' with the prefix 'module.backbone.': DINO",
    ),
    "teacher_and_student": (
        lambda s, n: {"state_dict": put("teacher.", s) | put("student.", moved(s)) | {"center": torch.ones(3)}},
        "without the prefix 'teacher.'",
    ),
    "twice_the_same": (lambda s, n: {"model": s, "net": s}, "took 'model' of file.pth"),
    "averaged_counters": (  # an average of every tensor makes floats of the counters of batch norm
        lambda s, n: {"ema": {k: v.float() for k, v in s.items()}},
        "took 'ema' (the average) of file.pth",
    ),
    "average_not_started": (
        lambda s, n: {"model": s, "swa": put("module.", moved(s), n_averaged=torch.tensor(0))},
        "took 'model' of file.pth",
    ),
    "average_of_parameters_alone": (
        lambda s, n: {"model": s, "ema": {k: v for k, v in moved(s).items() if "running" not in k}},
        "took 'model' of file.pth; not the average under 'ema', which does not fit (30 missing: conv1.1.running_mean, ",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_other_programs_load_exactly(
    kind: str, tmp_path: Path, state: State, net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    write, announcement = KINDS[kind]
    expected = {k: v.half() if v.is_floating_point() else v for k, v in state.items()} if kind == "half" else state
    loaded = load(write(state, net), tmp_path / "file.pth")
    assert_same(loaded, expected)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32, torch.int64}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if announcement else 0)
    assert announcement in "".join(lines)


def test_file_without_a_folder_in_its_path_is_not_taken_for_published_weights(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, "last.ckpt")
    assert_same(dict(TimmBackbone("test_resnet", "last.ckpt").model.state_dict()), state)
    assert is_path("pytorch_model.bin")
    assert is_path("checkpoint.pth.tar")


def test_whole_modules_are_refused_with_the_way_to_convert(tmp_path: Path, net: nn.Module) -> None:
    way = r"In the program that wrote it, .*torch\.save\(model\.state_dict\(\), 'file_weights\.pth'\)"
    with pytest.raises(ValueError, match=f"holds a whole module .*{way}"):
        load(net, tmp_path / "file.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch deprecate TorchScript
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(net), str(tmp_path / "file.pt"))
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
