"""Cached rows equal the computed ones; any other file or cache key raises an error that names the difference."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.doubles import TINY, TinyBackbone, image_folder, save_image
from tests.features.images import contents, fill, names_in, store
from tl_lightning.backbones import EfficientNetLite
from tl_lightning.features import (
    DamagedStoreError,
    FeatureRows,
    FeatureStore,
    StaleStoreError,
    cache_key_of,
    extraction,
)
from tl_lightning.features._disk_space import warn_of_large_rows
from tl_lightning.features._manifest import Layout
from tl_lightning.features._messages import describe_gaps
from tl_lightning.features._shards import write_shard
from tl_lightning.features.cache_key import FORMAT
from tl_lightning.images import read_image
from tl_lightning.transforms import eval_transform

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_lightning.features.store.BLOCK", 16)
    monkeypatch.setattr("tl_lightning.features.extraction.BATCH", 8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", {"ant": 25, "bee": 16})


@pytest.mark.parametrize("boundary", ["head", "map", "layer2", "stem"])
def test_rows_equal_the_activations_of_the_backbone(root: Path, tmp_path: Path, boundary: str) -> None:
    backbone = TinyBackbone().eval()
    made = store(tmp_path / "cache", backbone, boundary)
    fill(root, [made], backbone)

    names = names_in(root)
    keys = list(names)
    batch = keys[16:24]  # the first of the second block
    images = torch.stack([eval_transform(TINY)(read_image(root / names[key])) for key in batch])
    expected: dict[str, Callable[[Tensor], Tensor]] = {
        "head": backbone,
        "map": backbone.forward_map,
        "layer2": backbone.split("layer2")[0],
        "stem": torch.nn.Identity(),
    }
    assert torch.equal(made.read(batch), expected[boundary](images))
    assert len(made) == 41
    backwards = made.read(keys[::-1])
    assert torch.equal(backwards.flip(0), made.read(keys))


def test_rows_keep_the_memory_layout_of_the_network(root: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone().to(memory_format=torch.channels_last).eval()
    made = store(tmp_path / "cache", backbone, "layer2")
    fill(root, [made], backbone)
    keys = list(names_in(root))
    images = torch.stack([eval_transform(TINY)(read_image(root / name)) for name in list(names_in(root).values())[:8]])
    expected = backbone.split("layer2")[0](images)
    for found in (made.read(keys[:8]), FeatureRows(made, keys, CPU).take(torch.arange(8))):
        assert torch.equal(found, expected)
        assert found.stride()[1:] == expected.stride()[1:]


def test_rows_mapped_from_disk_equal_rows_in_memory(root: Path, tmp_path: Path) -> None:
    made = [store(tmp_path / "cache", TinyBackbone(), "layer2", dtype) for dtype in ("float32", "bfloat16")]
    for each in made:
        fill(root, [each])
        keys = list(names_in(root))
        resident, mapped = FeatureRows(each, keys, CPU), FeatureRows(each, keys, CPU, share=0.0)
        assert resident.resident is not None
        assert mapped.resident is None
        places = torch.randperm(len(keys))[:30]
        assert torch.equal(resident.take(places), mapped.take(places))
        assert resident.take(places).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_report_their_rounding_error(root: Path, tmp_path: Path, dtype: str) -> None:
    exact, narrow = (store(tmp_path / "cache", TinyBackbone(), "layer1", each) for each in ("float32", dtype))
    fill(root, [exact])
    error = fill(root, [narrow]).error
    keys = list(names_in(root))[:16]
    measured = float((narrow.read(keys).float() - exact.read(keys)).norm() / exact.read(keys).norm())
    assert 0 < measured <= error < {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
    shards = [sum(f.stat().st_size for f in each.folder.glob("*.npy")) for each in (exact, narrow)]
    assert shards[1] < 0.6 * shards[0]


def test_activations_too_large_for_the_dtype_are_refused(root: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone.get_parameter("model.stem.norm.weight").mul_(1e6)
    with pytest.raises(ValueError, match=r"go beyond float16, up to .*float32 or bfloat16"):
        fill(root, [store(tmp_path / "cache", backbone, "layer1", "float16")], backbone)
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def change_a_weight(backbone: TinyBackbone, name: str) -> TinyBackbone:
    with torch.no_grad():
        backbone.get_parameter(name).view(-1)[0] += 1e-3
    return backbone


def test_every_change_is_named_by_its_field(root: Path, tmp_path: Path) -> None:
    made = store(tmp_path / "cache", TinyBackbone(), "layer2")
    fill(root, [made])
    cropped = TinyBackbone()
    cropped.preprocessing = TINY._replace(crop=12)
    moved = TinyBackbone()
    moved.get_buffer("model.layer1.norm.running_mean")[0] += 1e-3
    others = {
        "weights": cache_key_of(
            change_a_weight(TinyBackbone(), "model.layer1.conv.weight"), "layer2", background=(255,) * 3
        ),
        "weights ": cache_key_of(moved, "layer2", background=(255,) * 3),
        "preprocessing": cache_key_of(cropped, "layer2", background=(255,) * 3),
        "preprocessing ": cache_key_of(TinyBackbone(), "layer2", background=(0, 0, 0)),
        "boundary": cache_key_of(TinyBackbone(), "layer3", background=(255,) * 3),
        "dtype": cache_key_of(TinyBackbone(), "layer2", background=(255,) * 3, dtype="float16"),
        "augmentation": cache_key_of(TinyBackbone(), "layer2", background=(255,) * 3, augmentation="flips"),
        "backbone": cache_key_of(TinyBackbone(dropout=0.1), "layer2", background=(255,) * 3),
    }
    for field, cache_key in others.items():
        with pytest.raises(StaleStoreError, match=f"do not fit: (.*; )?{field.strip()} is .* and was "):
            FeatureStore(made.folder, cache_key)
        assert cache_key.folder != made.cache_key.folder
    # Weights after the boundary do not count.
    later = cache_key_of(change_a_weight(TinyBackbone(), "model.layer3.conv.weight"), "layer2", background=(255,) * 3)
    assert later == made.cache_key

    fresh = store(tmp_path / "cache", cropped, "layer2")
    assert describe_gaps(fresh, names_in(root)) == "the rows cached before differ in preprocessing, and are kept"


class Unsteady(TinyBackbone):
    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = super().forward(images)
        if self.by == "chance":
            return rows + 0.1 * torch.randn(1)
        return rows - rows.mean(0) if len(rows) > 1 else rows


@pytest.mark.parametrize("by", ["chance", "neighbours"])
def test_activations_that_do_not_depend_on_the_image_alone_are_refused(by: str, root: Path, tmp_path: Path) -> None:
    backbone = Unsteady(by)
    with pytest.raises(
        ValueError, match="Unsteady does not compute the same output for an image each time, even in eval"
    ):
        fill(root, [store(tmp_path / "cache", backbone)], backbone)
    assert not list((tmp_path / "cache").glob("*/*"))


class Doubled(TinyBackbone):
    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = super().forward(images)
        return 2 * rows


def test_a_forward_that_does_more_than_the_stages_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Doubled computes other features than its stages one after the other"):
        fill(root, [store(tmp_path / "cache", Doubled(), "layer2")], Doubled())
    assert not list((tmp_path / "cache").glob("*/*"))


def test_the_network_is_checked_only_where_a_store_begins(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(extraction, "check_deterministic", lambda backbone, boundary: checked.append(boundary))
    for _ in range(2):
        fill(root, [store(tmp_path / "cache", TinyBackbone(), boundary) for boundary in ("head", "layer2")])
    save_image(root / "ant" / "new.png", seed=9000)
    assert fill(root, [store(tmp_path / "cache", TinyBackbone())]).rows == 1
    assert checked == ["head", "layer2"]


def test_a_network_of_16_bits_gets_its_memory_layout_from_extraction(root: Path, tmp_path: Path) -> None:
    for file in sorted(root.rglob("*.png"))[2:]:
        file.unlink()
    backbone = EfficientNetLite(image_size=64).half()
    cache_key = cache_key_of(backbone, "head", background=(255,) * 3)
    for rows in (2, 0):
        found = FeatureStore(tmp_path / "cache" / cache_key.folder, cache_key)
        assert fill(root, [found], backbone).rows == rows


def test_a_full_disk_raises_the_error_of_the_system(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_shard(tmp_path / "shard.npy", torch.zeros(64, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno is not None
    assert not (tmp_path / "shard.npy").exists()
    write_shard(tmp_path / "shard.npy", torch.zeros(64, 1000))
    np.save(tmp_path / "numpy.npy", np.zeros((64, 1000), np.float32))
    assert (tmp_path / "shard.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_only_changed_and_new_images_are_computed(root: Path, tmp_path: Path) -> None:
    made = store(tmp_path / "cache", TinyBackbone(), "layer2")
    fill(root, [made])
    before = {path.name: path.read_bytes() for path in made.folder.glob("*.npy")}
    changed = root / "ant" / "007.png"
    pixels = np.asarray(Image.open(changed)).copy()
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    for number in range(10):
        save_image(root / "ant" / f"0{number}new.png", seed=9000 + number)
    (root / "ant" / "008.png").rename(root / "bee" / "moved.png")

    said = describe_gaps(made, names_in(root))
    assert said.startswith("images: 1 changed (ant/007.png) and 10 new (ant/00new.png, ant/01new.png, ")
    seen: list[str] = []
    done = fill(root, [made], seen=seen)
    assert done.rows == len(seen) == 11
    assert sorted(seen) == sorted(["ant/007.png", *(f"ant/0{number}new.png" for number in range(10))])
    assert {name: data for name, data in contents(made.folder).items() if name in before} == before

    afresh = store(tmp_path / "afresh", TinyBackbone(), "layer2")
    fill(root, [afresh])
    keys = list(names_in(root))
    assert torch.equal(made.read(keys), afresh.read(keys))  # although other images were beside them
    assert fill(root, [made]).rows == 0


def test_only_the_damaged_shard_is_named_and_computed_again(root: Path, tmp_path: Path) -> None:
    made = store(tmp_path / "cache", TinyBackbone())
    fill(root, [made])
    before = contents(made.folder)
    shard = made.folder / made.blocks[1].file
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)

    keys = list(names_in(root))
    again = FeatureStore(made.folder, made.cache_key)
    assert len(again.read(keys[:16])) == 16  # the other shard is as good as before
    with pytest.raises(DamagedStoreError, match=f"{shard.name}.*Remove this file and run again: only its 16 rows"):
        again.read(keys)
    shard.unlink()
    with pytest.raises(DamagedStoreError, match=f"{shard.name}' is missing; run again"):
        again.read(keys)
    seen: list[str] = []
    fill(root, [again], seen=seen)
    assert len(seen) == 16
    assert contents(made.folder) == before


def test_a_shard_that_was_cut_short_is_computed_again(root: Path, tmp_path: Path) -> None:
    made = store(tmp_path / "cache", TinyBackbone())
    fill(root, [made])
    before = contents(made.folder)
    for manifest_is_lost in (False, True):
        assert describe_gaps(made, names_in(root)) == ""
        shard = made.folder / made.blocks[1].file
        shard.write_bytes(shard.read_bytes()[:-100])
        assert describe_gaps(made, names_in(root)) == "the shards of 16 rows are missing or cut short"
        if manifest_is_lost:
            (made.folder / "manifest.json").unlink()
        seen: list[str] = []
        fill(root, [store(tmp_path / "cache", TinyBackbone())], seen=seen)
        assert len(seen) == 16
        assert contents(made.folder) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"cache_key": 3}',
        "[]",
        f'{{"cache_key": {{"format": {FORMAT}}}, "shards": [], "row_shape": [1], "channels_last": false}}',
    ],
)
def test_a_damaged_manifest_is_named(root: Path, tmp_path: Path, text: str) -> None:
    made = store(tmp_path / "cache", TinyBackbone())
    fill(root, [made])
    before = contents(made.folder)
    manifest = made.folder / "manifest.json"
    manifest.write_text(text)
    with pytest.raises(DamagedStoreError, match=re.escape(str(manifest)) + ".*remove its folder and run again"):
        FeatureStore(made.folder, made.cache_key)
    shutil.rmtree(made.folder)
    seen: list[str] = []
    fill(root, [store(tmp_path / "cache", TinyBackbone())], seen=seen)
    assert len(seen) == 41
    assert contents(made.folder) == before


@pytest.mark.parametrize(("found", "cure"), [(99, "update tl_lightning"), (1, "remove its folder and run again")])
def test_another_format_is_named(found: int, cure: str, root: Path, tmp_path: Path) -> None:
    made = store(tmp_path / "cache", TinyBackbone())
    fill(root, [made])
    manifest = made.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["cache_key"]["format"] = found
    manifest.write_text(json.dumps(content))
    with pytest.raises(StaleStoreError, match=f"has format {found}, and this version reads format {FORMAT}; {cure}"):
        FeatureStore(made.folder, made.cache_key)


def test_too_little_space_raises_before_anything_is_computed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000})())
    seen: list[str] = []
    with pytest.raises(OSError, match=r"41 rows of 24 float32 at the boundary 'head' take 0.0 MB, and 0.0 MB are free"):
        fill(root, [store(tmp_path / "cache", TinyBackbone())], seen=seen)
    assert seen == []


def test_rows_larger_than_their_images_are_warned_of_if_memory_cannot_hold_them() -> None:
    large, small = Layout((512, 32, 32), False), Layout((512,), False)
    image_bytes = 3 * 224 * 224
    assert warn_of_large_rows(small, "float32", 100_000_000, image_bytes, CPU) == ""
    assert warn_of_large_rows(large, "float32", 100, image_bytes, CPU) == ""
    assert warn_of_large_rows(large, "float32", 10_000_000, image_bytes, CPU).startswith(
        "this may not pay: memory cannot hold these features, so each epoch reads 20971.5 GB from disk, and a "
        "row of 2.1 MB is larger than the 0.2 MB of pixels that it is computed from; cache a later boundary"
    )
