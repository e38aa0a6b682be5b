"""Rows that other code or another library computed are never read."""

import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.doubles import TinyBackbone, image_folder
from tests.features.images import fill, names_in, store
from tl_lightning.features import CacheKey, FeatureStore, StaleStoreError, cache_key_of
from tl_lightning.features._manifest import cache_keys_in
from tl_lightning.features._messages import describe_gaps

NETWORK = """
from torch import Tensor, nn
from tests.doubles import TINY, TinyNet
from tl_lightning.backbones import TracedBackbone

class Scale(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 1.0

class Net(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, images: Tensor) -> Tensor:
        return self.scale(super().forward(images)).relu()

class UserBackbone(TracedBackbone):
    gain = 1.0

    @property
    def shift(self) -> float:
        return 0.0

    def amplify(self, features: Tensor, factor: float = 1.0) -> Tensor:
        return features * factor * self.gain + self.shift

    def __init__(self) -> None:
        super().__init__(Net(), "user", TINY)

    def forward(self, images: Tensor) -> Tensor:
        output = self.amplify(super().forward(images))
        return output
"""
EDITS = {
    "the class of the backbone": ("return output\n", "return 1 + output\n"),
    "the class of the network": (".relu()", ".sigmoid()"),
    "a layer": ("inputs * 1.0", "inputs * 1.5"),
    "an attribute of the class": ("gain = 1.0", "gain = 1.5"),
    "a property": ("return 0.0", "return 0.5"),
    "a default argument": ("factor: float = 1.0", "factor: float = 1.5"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", {"ant": 5, "bee": 4})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second share a time stamp
    monkeypatch.delitem(sys.modules, "user_network", raising=False)
    return tmp_path


def user_backbone(folder: Path, text: str = NETWORK) -> TinyBackbone:
    """Import the file of a user and make the backbone in it."""
    file = folder / "user_network.py"
    file.write_text(text)
    spec = spec_from_file_location("user_network", file)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = module_from_spec(spec)
    sys.modules["user_network"] = module
    spec.loader.exec_module(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone: TinyBackbone = module.UserBackbone()
    return backbone


@pytest.mark.parametrize("boundary", ["head", "layer2"])
@pytest.mark.parametrize("edit", EDITS)
def test_rows_of_edited_code_are_computed_anew(edit: str, boundary: str, root: Path, folder: Path) -> None:
    old, new = EDITS[edit]
    assert old in NETWORK
    cache, keys = folder / "cache", list(names_in(root))
    first = user_backbone(folder)
    made = store(cache, first, boundary)
    assert fill(root, [made], first).rows == 9

    edited = user_backbone(folder, NETWORK.replace(old, new))
    other = store(cache, edited, boundary)
    assert describe_gaps(other, names_in(root)) == "the rows cached before differ in code, and are kept"
    if edit not in ("the class of the network", "a layer") and boundary == "layer2":  # an edit of the backbone's class
        with pytest.raises(ValueError, match="UserBackbone computes other features than its stages"):
            fill(root, [other], edited)
        return
    assert fill(root, [other], edited).rows == 9
    assert torch.equal(other.read(keys), made.read(keys)) == (boundary == "layer2")

    again = user_backbone(folder)
    assert fill(root, [store(cache, again, boundary)], again).rows == 0
    assert len(list(cache.glob("*/manifest.json"))) == 2


def test_rows_of_the_same_code_are_reused_wherever_it_lies(root: Path, folder: Path) -> None:
    first = user_backbone(folder)
    fill(root, [store(folder / "cache", first)], first)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    moved = user_backbone(elsewhere, "import math\n\n\n" + NETWORK + "\n\nclass Another:\n    pass\n")
    assert fill(root, [store(folder / "cache", moved)], moved).rows == 0


def test_an_edited_file_that_was_not_imported_again_is_told_from_one_that_was(folder: Path) -> None:
    old, new = EDITS["a layer"]
    running = user_backbone(folder)
    before = _key(running)
    (folder / "user_network.py").write_text(NETWORK.replace(old, new))
    edited_on_disk = _key(running)
    after = _key(user_backbone(folder, NETWORK.replace(old, new)))
    assert len({before.code, edited_on_disk.code, after.code}) == 3


def test_a_class_without_source_is_known_by_its_name() -> None:
    namespace = {"__name__": "notebook"}
    exec("from torch import nn\nclass Layer(nn.Module):\n    def forward(self, x): return x", namespace)  # noqa: S102
    backbone = TinyBackbone()
    backbone.model.extra = namespace["Layer"]()  # type: ignore[operator]
    code = _key(backbone).code
    assert code.endswith(" (without the source of notebook.Layer)")
    assert " " not in _key(TinyBackbone()).code


def _key(backbone: TinyBackbone) -> CacheKey:
    return cache_key_of(backbone, "head", background=(255, 255, 255))


def test_a_hook_and_a_replaced_forward_are_noticed() -> None:
    hooked, replaced = TinyBackbone(), TinyBackbone()
    hooked.get_submodule("model.stem.norm").register_forward_hook(lambda _, args, output: output * 1.5)
    replaced.get_submodule("model.stem.dropout").forward = torch.relu
    assert len({_key(backbone).code for backbone in (TinyBackbone(), hooked, replaced)}) == 3


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm"])
def test_rows_of_another_version_of_a_library_are_computed_anew(
    library: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    made = store(cache, TinyBackbone())
    fill(root, [made])
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == library else version(name))
    other = store(cache, TinyBackbone())
    assert other.folder != made.folder
    with pytest.raises(StaleStoreError, match=rf"do not fit: {library} is 0\.1 and was {version(library)}"):
        FeatureStore(made.folder, other.cache_key)
    assert describe_gaps(other, names_in(root)) == (
        f"the rows cached before differ in {library} ({version(library)}), and are kept"
    )
    assert fill(root, [other]).rows == 9
    monkeypatch.undo()
    assert fill(root, [store(cache, TinyBackbone())]).rows == 0


@pytest.mark.parametrize("field", ["cache_key", "recipe"])  # its name in format 2, and in format 1
def test_a_store_of_an_older_format_is_passed_over(field: str, root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = cache / "TinyBackbone_head-0123456789abcdef"
    old.mkdir(parents=True)
    content = {"backbone": "TinyBackbone", "weights": "abc", "boundary": "head", "format": 2}
    (old / "manifest.json").write_text(json.dumps({field: content, "shards": [], "row_shape": [24]}))
    (old / "response.json").write_text("[[1.0, 2.0]]")
    made = store(cache, TinyBackbone())
    assert cache_keys_in(cache) == []
    assert describe_gaps(made, names_in(root)) == ""
    assert fill(root, [made]).rows == 9
    assert cache_keys_in(cache) == [made.cache_key]


@pytest.mark.parametrize("edit", EDITS)
def test_code_without_source_is_told_apart_by_its_bytecode_and_values(edit: str) -> None:
    """As in a console or a notebook, whose classes have no file."""

    def key_of(text: str) -> CacheKey:
        namespace = {"__name__": "__main__"}
        exec(text, namespace)  # noqa: S102 - the text above
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = namespace["UserBackbone"]()  # type: ignore[operator]  # a class
        return cache_key_of(backbone, "head", background=(255, 255, 255))

    assert key_of(NETWORK) == key_of(NETWORK)
    assert key_of(NETWORK.replace(*EDITS[edit])) != key_of(NETWORK)


@pytest.mark.parametrize(
    "make", [lambda f: functools.partial(_scale, factor=f), lambda f: lambda m, i, o: _scale(m, i, o, f)]
)
def test_hooks_with_other_values_have_another_key(make: Callable[[float], Callable[..., torch.Tensor]]) -> None:
    keys = []
    for factor in (1.0, 2.0, 2.0):
        backbone = TinyBackbone()
        backbone.model.register_forward_hook(make(factor))
        keys.append(cache_key_of(backbone, "head", background=(255, 255, 255)))
    assert keys[0] != keys[1] == keys[2]


def _scale(module: nn.Module, inputs: object, output: torch.Tensor, factor: float) -> torch.Tensor:
    return output * factor
