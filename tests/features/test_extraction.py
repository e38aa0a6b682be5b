"""Extraction that is killed, shared among ranks, or run twice at once leaves the same bytes behind."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from tests.doubles import TinyBackbone, image_folder
from tests.features.images import contents, fill, names_in, store
from tests.ranks import run_on_ranks
from tl_lightning.features import cache_key_of, extraction, folder_for
from tl_lightning.features import store as stores
from tl_lightning.features._manifest import Block

BOUNDARIES = ("head", "layer2")
FORK = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import torch


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch.setattr)


def small(setattr_: Callable[[Any, str, int], None]) -> None:
    setattr_(stores, "BLOCK", 8)
    setattr_(extraction, "BATCH", 4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", {"ant": 24, "bee": 17})


@pytest.fixture
def in_peace(root: Path, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    made = [store(tmp_path / "peace", TinyBackbone(), boundary) for boundary in BOUNDARIES]
    fill(root, made)
    return {each.folder.name: contents(each.folder) for each in made}


def slowly(root: Path, cache: Path, begun: Any) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    at_once = stores.FeatureStore.write

    def write(self: stores.FeatureStore, block: Block, rows: torch.Tensor) -> float:
        time.sleep(0.004)
        return at_once(self, block, rows)

    stores.FeatureStore.write = write  # type: ignore[method-assign]  # of this process alone
    begun.set()
    fill(root, [store(cache, TinyBackbone(), boundary) for boundary in BOUNDARIES])


def never_partial(root: Path, cache: Path, expected: dict[str, dict[str, bytes]]) -> bool:
    """Whether all stores are complete; what can be read at all must be."""
    found = [store(cache, TinyBackbone(), boundary) for boundary in BOUNDARIES]
    for each in found:
        if len(each):
            keys = list(names_in(root))
            assert len(each.read(keys)) == 41
            written = contents(each.folder)
            assert {name: written[name] for name in expected[each.folder.name]} == expected[each.folder.name]
    return all(len(each) for each in found)


def test_killed_at_twenty_moments(root: Path, tmp_path: Path, in_peace: dict[str, dict[str, bytes]]) -> None:
    moments = torch.Generator().manual_seed(0)
    cache = tmp_path / "cache"
    kills = partly = 0
    span = 0.15  # seconds, of the moments; it follows how fast the machine is now
    while kills < 20:
        begun = FORK.Event()
        process = FORK.Process(target=slowly, args=(root, cache, begun))
        process.start()
        assert process.pid is not None
        begun.wait()
        process.join(span * float(torch.rand((), generator=moments)))
        killed = process.is_alive()
        if killed:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        kills += killed
        written = any(cache.rglob("*.npy"))
        partly += killed and written
        span *= 1 if written else 1.5
        if never_partial(root, cache, in_peace):
            assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == in_peace
            shutil.rmtree(cache)  # it was too fast: once more
            span /= 1.2
    assert partly > 5
    last = FORK.Process(target=slowly, args=(root, cache, FORK.Event()))
    last.start()
    last.join()
    assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == in_peace


def die_at(number: int, root: Path, cache: Path) -> None:
    torch.set_num_threads(1)
    calls = iter(range(1, 1000))
    flush, rename, head = os.fsync, Path.replace, np.lib.format.write_array_header_1_0

    def count() -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_flush(file: int) -> None:
        count()
        flush(file)

    def dying_rename(self: Path, target: Path) -> Path:
        count()
        return rename(self, target)

    def dying_head(file: IO[bytes], array: dict[str, Any]) -> None:
        head(file, array)
        file.flush()
        count()

    # Of this process alone:
    os.fsync, Path.replace = dying_flush, dying_rename  # type: ignore[assignment,method-assign]
    np.lib.format.write_array_header_1_0 = dying_head  # type: ignore[assignment]
    fill(root, [store(cache, TinyBackbone(), boundary) for boundary in BOUNDARIES])


def test_killed_before_every_write(root: Path, tmp_path: Path, in_peace: dict[str, dict[str, bytes]]) -> None:
    writes = sum(len(files) for files in in_peace.values())
    assert writes == 2 * (6 + 2)  # shards, response, manifest
    cache = tmp_path / "cache"
    for number in range(1, 2 * writes + 2 * 6 + 1):  # within a shard, before it is flushed, before it is renamed
        cache = tmp_path / f"cache{number}"
        first = FORK.Process(target=die_at, args=(number, root, cache))
        first.start()
        first.join()
        assert first.exitcode == -signal.SIGKILL
        never_partial(root, cache, in_peace)
        second = FORK.Process(target=die_at, args=(0, root, cache))
        second.start()
        second.join()
        assert second.exitcode == 0
        assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == in_peace


def count_rows(root: Path, cache: Path, computed: Any) -> None:
    torch.set_num_threads(1)
    seen: list[str] = []
    fill(root, [store(cache, TinyBackbone(), boundary) for boundary in BOUNDARIES], seen=seen)
    computed.put(len(seen))


def test_two_runs_at_once(root: Path, tmp_path: Path, in_peace: dict[str, dict[str, bytes]]) -> None:
    cache = tmp_path / "cache"
    computed = FORK.Queue()
    runs = [FORK.Process(target=count_rows, args=(root, cache, computed)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert sorted(computed.get() for _ in runs) == [0, 0, 0, 41]
    assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == in_peace


def choose(factor: float, cache: Path, begin: Any, chosen: Any) -> None:
    torch.set_num_threads(1)
    backbone = TinyBackbone()
    backbone.get_submodule("model.stem.norm").register_forward_hook(lambda _, args, output: output * factor)
    cache_key = cache_key_of(backbone, "head", background=(255,) * 3)
    begin.wait()
    chosen.put((factor, folder_for(cache, backbone, cache_key).name))


def test_runs_with_other_code_at_once_have_a_folder_each(tmp_path: Path) -> None:
    begin, chosen = FORK.Event(), FORK.Queue()
    runs = [FORK.Process(target=choose, args=(1 + n % 3, tmp_path / "cache", begin, chosen)) for n in range(9)]
    for run in runs:
        run.start()
    begin.set()
    folders: dict[int, set[str]] = {}
    for _ in runs:
        factor, name = chosen.get()
        folders.setdefault(factor, set()).add(name)
    for run in runs:
        run.join()
    assert [len(names) for names in folders.values()] == [1, 1, 1]
    assert len(set.union(*folders.values())) == 3


def test_runs_with_other_images_add_to_a_store(root: Path, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "other", {"cow": 9})
    made = store(tmp_path / "cache", TinyBackbone())
    fill(root, [made])
    reader = store(tmp_path / "cache", TinyBackbone())
    before = reader.read(list(names_in(root)))
    assert fill(other, [store(tmp_path / "cache", TinyBackbone())]).rows == 9 - len(
        names_in(root).keys() & names_in(other)
    )
    assert torch.equal(reader.read(list(names_in(root))), before)
    reader.reload()
    assert reader.read([*names_in(root), *names_in(other)]).shape == (50, 24)


def on_ranks(world: int, root: str, cache: str) -> list[str]:
    small(setattr)
    with ranks():
        seen: list[str] = []
        fill(Path(root), [store(Path(cache), TinyBackbone(), boundary) for boundary in BOUNDARIES], seen=seen)
        return seen


def failing_on_ranks(world: int, root: str, cache: str) -> list[str]:
    """Say what each rank says of an image that is none, of other weights, of other code, and of a lock that is none."""
    small(setattr)

    def said(begin: Callable[[], object]) -> str:
        try:
            begin()
        except (RuntimeError, ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    backbones = [TinyBackbone() for _ in range(3)]
    if os.environ["LOCAL_RANK"] == "1":
        torch.nn.init.zeros_(backbones[1].get_parameter("model.stem.conv.weight"))
        backbones[2].get_submodule("model.stem.norm").register_forward_hook(lambda _, args, output: output * 1.5)
    made = store(Path(cache), backbones[0])
    images, other = Path(root), Path(cache).with_name("other")
    with ranks():
        cache_keys = [cache_key_of(backbone, "head", background=(255,) * 3) for backbone in backbones]
        found = [said(partial(fill, images, [made]))]
        found += [said(partial(folder_for, other, b, r)) for b, r in zip(backbones[1:], cache_keys[1:], strict=True)]
        found += [said(partial(fill, images, [store(other, b)], b)) for b in backbones[1:]]
        if os.environ["LOCAL_RANK"] == "0":
            Path(f"{made.folder}.lock").unlink()
            Path(f"{made.folder}.lock").mkdir()
        found.append(said(partial(fill, images, [made])))
        return found


class ranks:
    def __enter__(self) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"]
        torch.distributed.init_process_group("gloo")

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()


def test_two_ranks_write_every_row_once(root: Path, tmp_path: Path, in_peace: dict[str, dict[str, bytes]]) -> None:
    cache = tmp_path / "cache"
    seen = run_on_ranks(__name__, "on_ranks", tmp_path / "out", root=str(root), cache=str(cache))
    assert sorted(seen[0] + seen[1]) == sorted(names_in(root).values())
    assert {len(share) for share in seen} == {24, 17}  # whole shards of 8
    assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == in_peace


def test_a_rank_that_fails_takes_the_others_along(root: Path, tmp_path: Path) -> None:
    (root / "ant" / "003.png").write_bytes(b"no image")
    first, second = run_on_ranks(
        __name__, "failing_on_ranks", tmp_path / "out", root=str(root), cache=str(tmp_path / "cache")
    )
    assert first[0].startswith("ValueError: cannot read the image")
    assert second[0].startswith("RuntimeError: rank 0 failed with ValueError: cannot read the image")
    assert first[1:5] == second[1:5]
    for said, what in zip(first[1:5], ["weights is", "the network has other code"] * 2, strict=True):
        assert said.startswith("StaleStoreError: rank 1 would compute other features than rank 0")
        assert what in said
    assert not (tmp_path / "other").exists()
    assert first[5].startswith("IsADirectoryError")
    assert second[5].startswith("RuntimeError: rank 0 failed with IsADirectoryError")


def test_only_what_is_lacking_is_computed_for_a_further_boundary(root: Path, tmp_path: Path) -> None:
    made = [store(tmp_path / "cache", TinyBackbone(), boundary) for boundary in BOUNDARIES]
    assert fill(root, made[:1]).rows == 41
    before = contents(made[0].folder)
    assert fill(root, made).rows == 41
    assert contents(made[0].folder) == before


def test_the_backbone_is_left_as_it_was(root: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    modes = {module: number % 3 == 0 for number, module in enumerate(backbone.modules())}
    for module, mode in modes.items():
        module.training = mode
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    fill(root, [store(tmp_path / "cache", backbone)], backbone)
    assert {module: module.training for module in backbone.modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(
        store(tmp_path / "cache", backbone).read(list(names_in(root))),
        _filled(root, tmp_path / "other").read(list(names_in(root))),
    )


def _filled(root: Path, cache: Path) -> stores.FeatureStore:
    made = store(cache, TinyBackbone())
    fill(root, [made])
    return made
