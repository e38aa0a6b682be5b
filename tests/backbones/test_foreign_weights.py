"""Weights as other training programs save one network: each file gives the right tensors."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.backbones.saved import State, assert_same, load, moved, network, put
from tl_lightning.backbones import TimmBackbone
from tl_lightning.backbones.weights import is_path


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def state() -> State:
    saved: State = network().state_dict()
    return saved


def optimizer(net: nn.Module) -> dict[str, Any]:
    stepped = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    return stepped | {"state": {0: {"momentum_buffer": torch.ones(3)}}}


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
