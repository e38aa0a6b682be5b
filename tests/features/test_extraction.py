"""An extraction that is killed, shared among ranks or run twice at once writes the same bytes as an undisturbed one."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from tests.doubles import TinyBackbone, image_folder
from tests.features.images import contents, fill, names_in, store
from tests.ranks import run_on_ranks
from tl_lightning.features import cache_key_of, check_ranks, extraction
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
def undisturbed(root: Path, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    made = [store(tmp_path / "undisturbed", TinyBackbone(), boundary) for boundary in BOUNDARIES]
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


def check_stores(root: Path, cache: Path, expected: dict[str, dict[str, bytes]]) -> bool:
    """Check the rows that can be read; return whether all stores are complete."""
    found = [store(cache, TinyBackbone(), boundary) for boundary in BOUNDARIES]
    for each in found:
        if len(each):
            keys = list(names_in(root))
            assert len(each.read(keys)) == 41
            written = contents(each.folder)
            assert {name: written[name] for name in expected[each.folder.name]} == expected[each.folder.name]
    return all(len(each) for each in found)


@pytest.mark.slow
def test_a_process_killed_at_any_of_twenty_moments_leaves_a_complete_store_or_none(
    root: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
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
        if check_stores(root, cache, undisturbed):
            assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == undisturbed
            shutil.rmtree(cache)  # it was too fast: once more
            span /= 1.2
    assert partly > 5
    last = FORK.Process(target=slowly, args=(root, cache, FORK.Event()))
    last.start()
    last.join()
    assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == undisturbed


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


@pytest.mark.slow
def test_a_process_killed_before_any_write_leaves_a_complete_store_or_none(
    root: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    writes = sum(len(files) for files in undisturbed.values())
    assert writes == 2 * (6 + 1)  # shards, manifest
    cache = tmp_path / "cache"
    for number in range(1, 2 * writes + 2 * 6 + 1):  # within a shard, before it is flushed, before it is renamed
        cache = tmp_path / f"cache{number}"
        first = FORK.Process(target=die_at, args=(number, root, cache))
        first.start()
        first.join()
        assert first.exitcode == -signal.SIGKILL
        check_stores(root, cache, undisturbed)
        second = FORK.Process(target=die_at, args=(0, root, cache))
        second.start()
        second.join()
        assert second.exitcode == 0
        assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == undisturbed


def count_rows(root: Path, cache: Path, computed: Any) -> None:
    torch.set_num_threads(1)
    seen: list[str] = []
    fill(root, [store(cache, TinyBackbone(), boundary) for boundary in BOUNDARIES], seen=seen)
    computed.put(len(seen))


def test_runs_at_once_compute_every_row_once(
    root: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    cache = tmp_path / "cache"
    computed = FORK.Queue()
    runs = [FORK.Process(target=count_rows, args=(root, cache, computed)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert sorted(computed.get() for _ in runs) == [0, 0, 0, 41]
    assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == undisturbed


def test_a_run_with_other_images_adds_rows_to_a_store(root: Path, tmp_path: Path) -> None:
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
    """Return each rank's errors of a damaged image, other weights, another torch, and a lock that is a folder."""
    small(setattr)

    def error_of(begin: Callable[[], object]) -> str:
        try:
            begin()
        except (RuntimeError, ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    other = TinyBackbone()
    if os.environ["LOCAL_RANK"] == "1":
        torch.nn.init.zeros_(other.get_parameter("model.stem.conv.weight"))
    made, of_other = (store(Path(cache), backbone) for backbone in (TinyBackbone(), other))
    images = Path(root)
    with ranks():
        found = [error_of(partial(fill, images, [made])), error_of(partial(fill, images, [of_other], other))]
        version = metadata.version
        if os.environ["LOCAL_RANK"] == "1":
            # Of this process alone:
            metadata.version = lambda name: "0.1" if name == "torch" else version(name)  # type: ignore[assignment]
        found.append(error_of(lambda: check_ranks([cache_key_of(TinyBackbone(), "head", background=(255,) * 3)])))
        if os.environ["LOCAL_RANK"] == "0":
            Path(f"{made.folder}.lock").unlink()
            Path(f"{made.folder}.lock").mkdir()
        found.append(error_of(partial(fill, images, [made])))
        return found


class ranks:
    def __enter__(self) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"]
        torch.distributed.init_process_group("gloo")

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()


def test_two_ranks_write_every_row_once(root: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]) -> None:
    cache = tmp_path / "cache"
    seen = run_on_ranks(__name__, "on_ranks", tmp_path / "out", root=str(root), cache=str(cache))
    assert sorted(seen[0] + seen[1]) == sorted(names_in(root).values())
    assert {len(share) for share in seen} == {24, 17}  # whole shards of 8
    assert {f.name: contents(f) for f in cache.iterdir() if f.is_dir()} == undisturbed


def test_an_error_on_one_rank_ends_all_ranks(root: Path, tmp_path: Path) -> None:
    (root / "ant" / "003.png").write_bytes(b"no image")
    first, second = run_on_ranks(
        __name__, "failing_on_ranks", tmp_path / "out", root=str(root), cache=str(tmp_path / "cache")
    )
    assert first[0].startswith("ImageError: cannot read the image")
    assert second[0].startswith("RuntimeError: rank 0 failed with ImageError: cannot read the image")
    assert first[1:3] == second[1:3]
    for error, difference in zip(
        first[1:3], ["weights is", rf"torch is 0.1 and rank 0 has {metadata.version('torch')}"], strict=True
    ):
        assert error.startswith("StaleStoreError: rank 1 would compute other features than rank 0")
        assert difference in error
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]  # of the first store alone
    assert first[3].startswith("IsADirectoryError")
    assert second[3].startswith("RuntimeError: rank 0 failed with IsADirectoryError")


def test_a_further_boundary_leaves_the_rows_of_the_first_alone(root: Path, tmp_path: Path) -> None:
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
