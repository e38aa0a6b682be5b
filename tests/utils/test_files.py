"""A file is replaced whole or not at all."""

from functools import partial
from pathlib import Path
from typing import IO

import pytest

from tl_lightning.utils.files import write_atomically


def write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def test_file_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_atomically(tmp_path / "file", partial(write, content))
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), r"file' cannot be written \(No space left on device\)"),
        (ValueError("not a number"), "not a number"),
        (KeyboardInterrupt("stop"), "stop"),
    ],
)
def test_failed_write_leaves_the_file_from_before_and_no_other(error: BaseException, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error), match=said):
        write_atomically(tmp_path / "file", write)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_full_disk_is_found_behind_the_error_of_a_library(tmp_path: Path) -> None:
    """torch.save raises its own error while it handles the system's."""

    def write(file: IO[bytes]) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 20001408 vs 20001360")

    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); free some space"):
        write_atomically(tmp_path / "file", write)


def test_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none/file' cannot be written \(No such file or directory\)"):
        write_atomically(tmp_path / "none" / "file", lambda file: file.write(b""))
