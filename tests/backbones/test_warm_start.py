"""A checkpoint of this library gives its backbone as the first weights of another one."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from tl_lightning.backbones import TimmBackbone, TruncatedBackbone
from tl_lightning.backbones.weights import load_weights_file
from tl_lightning.modules import LinearProbe
from tl_lightning.utils.hashing import fingerprint


@pytest.fixture(scope="module")
def backbone() -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone("test_resnet", weights=None, image_size=32)


@pytest.fixture(scope="module")
def checkpoint(backbone: TimmBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(LinearProbe(backbone, 3), tmp_path_factory.mktemp("run") / "best.ckpt")


def save(classifier: LinearProbe, path: Path) -> Path:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(path, weights_only=False)
    return path


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name


def test_backbone_of_a_checkpoint_is_loaded(
    checkpoint: Path, backbone: TimmBackbone, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_same(TimmBackbone("test_resnet", str(checkpoint), image_size=32).model, backbone.model)
    assert capsys.readouterr().out == (
        "weights: took 'state_dict' of best.ckpt, without the prefix 'backbone.model.'; the file is a checkpoint of "
        "tl_lightning with TimmBackbone test_resnet\n"
    )


def test_whole_network_of_a_truncated_backbone_is_loaded(backbone: TimmBackbone, tmp_path: Path) -> None:
    path = save(LinearProbe(TruncatedBackbone(backbone, backbone.stages[-1]), 3), tmp_path / "best.ckpt")
    assert_same(TimmBackbone("test_resnet", str(path), image_size=32).model, backbone.model)


def test_checkpoint_of_another_network_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    for other in ("test_efficientnet", "test_vit"):
        with pytest.raises(ValueError, match=f"with TimmBackbone test_resnet, and this network is {other}"):
            TimmBackbone(other, str(checkpoint))
    saved = torch.load(checkpoint, weights_only=True)
    saved["tl_lightning"]["model"]["backbone"]["init_args"]["name"] = "test_resnet_of_other_code"  # the tensors fit
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="TimmBackbone test_resnet_of_other_code, and this network is test_resnet"):
        TimmBackbone("test_resnet", str(tmp_path / "other.ckpt"))


def test_auxiliary_heads_return_to_the_network(tmp_path: Path) -> None:
    """TorchvisionBackbone loads them as a part of Inception and GoogLeNet, and saves them beside the network."""
    state = {"backbone.model.conv.weight": torch.randn(3, 3), "backbone.auxiliary.aux1.weight": torch.randn(2, 3)}
    backbone = {"class_path": "x.TorchvisionBackbone", "init_args": {"name": "googlenet"}}
    description = {"model": {"backbone": backbone}, "hashes": {"backbone": fingerprint(state)}}
    torch.save({"state_dict": state | {"head.weight": torch.ones(2)}, "tl_lightning": description}, tmp_path / "a.ckpt")
    network = torch.nn.Sequential(
        OrderedDict(conv=torch.nn.Linear(3, 3, bias=False), aux1=torch.nn.Linear(3, 2, bias=False))
    )
    load_weights_file(network, tmp_path / "a.ckpt", name="googlenet", classifier="fc")
    assert torch.equal(network.get_parameter("aux1.weight"), state["backbone.auxiliary.aux1.weight"])
    assert torch.equal(network.get_parameter("conv.weight"), state["backbone.model.conv.weight"])


def changed_weight(saved: dict[str, Any]) -> None:
    saved["state_dict"]["backbone.model.bn1.weight"][0] += 0.5


def without_description(saved: dict[str, Any]) -> None:
    del saved["tl_lightning"]["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_weight, "with TimmBackbone test_resnet, but its weights are not the saved ones"),
        (without_description, r"is a damaged checkpoint of tl_lightning \(KeyError: 'model'\)"),
    ],
)
def test_damaged_checkpoint_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=message):
        TimmBackbone("test_resnet", str(tmp_path / "damaged.ckpt"))
