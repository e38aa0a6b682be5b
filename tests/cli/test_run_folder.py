"""Each run has a folder of its own, and checkpoints are found in the newest."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.runs import Run
from tl_lightning.cli.run_folder import (
    create_run_folder,
    find_checkpoint,
    find_resumable_checkpoint,
    remove_run_folder,
)


def test_runs_that_start_at_once_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(create_run_folder, [tmp_path / "runs"] * 40))
    assert len(set(folders)) == 40
    assert sorted(int(folder.name[8:]) for folder in folders) == list(range(40))


def test_root_where_no_folder_can_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"default_root_dir is the file '.*file'; give a folder"):
        create_run_folder(tmp_path / "file")
    with pytest.raises(OSError, match=r"file/runs', where no folder can be created \(Not a directory\); give another"):
        create_run_folder(tmp_path / "file" / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "not mounted" / "runs")
    with pytest.raises(OSError, match=r"default_root_dir is .*link.*, where no folder can be created \(File exists\)"):
        create_run_folder(tmp_path / "link")


def test_folder_is_removed_only_while_it_holds_nothing_but_the_files_of_a_start(tmp_path: Path) -> None:
    folders = [create_run_folder(tmp_path) for _ in range(2)]
    for folder in folders:
        for name in ("config.yaml", "hparams.yaml", "metrics.csv", "events.out.tfevents.1.host"):
            (folder / name).touch()
    (folders[1] / "notes.txt").touch()
    for folder in folders:
        remove_run_folder(folder)
    assert [folder.is_dir() for folder in folders] == [False, True]
    assert (folders[1] / "config.yaml").is_file()


def test_checkpoint_is_that_of_the_newest_run_that_has_it(tmp_path: Path) -> None:
    for number in (2, 10, 11):
        (tmp_path / f"version_{number}" / "checkpoints").mkdir(parents=True)
        if number < 11:
            (tmp_path / f"version_{number}" / "checkpoints" / "last.ckpt").touch()
    assert find_checkpoint(tmp_path, "last").parts[-3] == "version_10"
    with pytest.raises(FileNotFoundError, match=r"has a best\.ckpt; give the path"):
        find_checkpoint(tmp_path, "best")


def test_run_resumes_from_the_last_checkpoint_that_is_not_damaged(short: Run, tmp_path: Path) -> None:
    older, newer = (tmp_path / f"version_{number}" / "checkpoints" for number in (3, 4))
    for folder in (older, newer):
        folder.mkdir(parents=True)
        for name in ("last", "step"):  # the second is the later one
            shutil.copyfile(short.last, folder / f"{name}.ckpt")
        shutil.copyfile(short.best, folder / "best.ckpt")
    assert find_resumable_checkpoint(tmp_path)[0] == newer / "step.ckpt"
    content = bytearray(short.last.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a tensor
    for damaged in (bytes(content), b"", short.last.read_bytes()[:999]):
        (newer / "step.ckpt").write_bytes(damaged)
        with pytest.warns(
            UserWarning, match=r"step\.ckpt' cannot be read safely .* resumes from .*4/checkpoints/last\.ck"
        ):
            found, mapped = find_resumable_checkpoint(tmp_path)
        assert found == newer / "last.ckpt"
        assert mapped["epoch"] == 0
    (newer / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"the newest run cannot be resumed: the checkpoint .* cannot be read"):
        find_resumable_checkpoint(tmp_path)  # rather than resume the older run
    shutil.rmtree(newer.parent)
    assert find_resumable_checkpoint(tmp_path)[0] == older / "step.ckpt"
    shutil.rmtree(older.parent)
    with pytest.raises(FileNotFoundError, match=r"no run in .* can be resumed; give the path of a checkpoint"):
        find_resumable_checkpoint(tmp_path)
