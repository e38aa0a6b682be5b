"""Any head trains on a frozen backbone, on its pooled features or on its spatial map."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tests.doubles import TinyBackbone
from tests.modules.test_partial_fine_tuning import fit, moved, small, stages_of
from tests.staged import images, trainer
from tl_lightning.backbones import TimmBackbone
from tl_lightning.cli import main
from tl_lightning.heads import ConvHead, CosineHead, LinearHead, MLPHead
from tl_lightning.modules import CustomHeadClassifier, PartialFineTuning, TransferClassifier

HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": LinearHead,
    "mlp": functools.partial(MLPHead, hidden=[8], norm="layer"),
    "cosine": CosineHead,
    "conv": functools.partial(ConvHead, channels=6),
    "torch.nn.Linear": nn.Linear,
}


@pytest.mark.parametrize("kind", HEADS)
def test_head_trains_alone_and_is_restored_from_its_checkpoint(kind: str, photos: Path, tmp_path: Path) -> None:
    model = CustomHeadClassifier(TinyBackbone(), 3, HEADS[kind], lr=0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, images(photos))
    assert stages_of(moved(model, before)) == {"head"}
    assert all(not torch.equal(parameter, before[f"head.{name}"]) for name, parameter in model.head.named_parameters())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = TransferClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    pictures = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(pictures), model.eval()(pictures))


def test_conv_head_trains_alone_on_the_spatial_map_of_resnet18(tmp_path: Path) -> None:
    model = CustomHeadClassifier(small("resnet18"), 3, functools.partial(ConvHead, channels=256), lr=0.01)
    assert isinstance(model.head, ConvHead)
    assert (model.head.conv.in_channels, model.head.conv.out_channels, model.head.conv.kernel_size) == (
        512,
        256,
        (3, 3),
    )
    before = fit(model, tmp_path)
    assert moved(model, before) == {f"head.{name}" for name, _ in model.head.named_parameters()}


def test_spatial_map_of_a_vit_is_formed_from_its_patch_tokens() -> None:
    model = CustomHeadClassifier(TimmBackbone("test_vit", weights=None), 3, ConvHead).eval()
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        model(torch.zeros(2, 3, 160, 160))
    assert seen == [(2, 64, 10, 10)]


def local_head(in_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(in_features, num_classes)


def test_local_heads_and_map_heads_on_pooled_features_are_refused() -> None:
    class Local(nn.Linear):
        pass

    for head in (Local, functools.partial(Local, bias=False), lambda features, classes: nn.Linear(features, classes)):
        with pytest.raises(ValueError, match="could not be saved"):
            CustomHeadClassifier(TinyBackbone(), 3, head)
    with pytest.raises(ValueError, match=r"ConvHead takes the spatial map.*CustomHeadClassifier"):
        PartialFineTuning(TinyBackbone(), 3, "layer3", head=ConvHead)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"class_path": "MLPHead", "init_args": {"hidden": [5], "dropout": 0.1}}, MLPHead),
        ({"class_path": "tl_lightning.heads.ConvHead", "init_args": {"channels": 5}}, ConvHead),
        ({"class_path": "torch.nn.Linear", "init_args": {"bias": False}}, nn.Linear),
    ],
    ids=["MLPHead", "ConvHead", "torch.nn.Linear"],
)
def test_head_is_chosen_by_class_path_in_a_configuration(
    head: dict[str, object], expected: type[nn.Module], photos: Path, tmp_path: Path
) -> None:
    config = {
        "backbone": {"class_path": "tests.doubles.TinyBackbone"},
        "data": {"class_path": "ImageFolderDataModule", "init_args": {"root": str(photos), "num_workers": 0}},
        "model": {"class_path": "CustomHeadClassifier", "init_args": {"head": head}},
        "trainer": {"max_epochs": 1, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={tmp_path / 'head.yaml'}"])
    model = TransferClassifier.load_from_checkpoint(tmp_path / "version_0" / "checkpoints" / "best.ckpt")
    assert isinstance(model.head, expected)
