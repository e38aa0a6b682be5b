"""Every file and folder that an image folder leaves out, or cannot read, is named."""

import os
import shutil
import socket
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data.folders import data
from tests.doubles import image_folder, save_image
from tl_lightning.images import ImageError

NOBODY = 65534


@contextmanager
def without_root() -> Iterator[None]:
    """Give up the rights of root, for which permissions do not count."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """Make a folder that any user may read, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o000, 0o311, 0o644])
@pytest.mark.parametrize("place", ["", "bee", "bee/garden"])
def test_folder_that_cannot_be_read_is_named(place: str, mode: int, public: Path) -> None:
    """Without permission to list it, and without permission to open files in it."""
    root = image_folder(public / "photos", {"ant": 3, "bee": 3})
    save_image(root / "bee" / "garden" / "x.png", 0)
    (root / place).chmod(mode)
    try:
        with without_root():
            with pytest.raises((OSError, ValueError)) as labelled:
                data(root).setup("fit")
            assert str(root) in str(labelled.value)
            assert place in str(labelled.value)
            assert "Permission denied" in str(labelled.value)
            if mode != 0o644:  # otherwise each of its images is named when it is read
                with pytest.raises(OSError, match="cannot list the folder") as flat:
                    data(root).setup("predict")
                assert str(root / place) in str(flat.value)
    finally:
        (root / place).chmod(0o755)


def test_entry_of_unknown_kind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems do not say whether an entry is a folder, and then fail to."""
    root = image_folder(tmp_path, {"ant": 3, "bee": 3})
    scandir = os.scandir

    class Entry:
        def __init__(self, entry: "os.DirEntry[str]") -> None:
            self.name, self.path = entry.name, entry.path
            self.is_symlink, self.is_file = entry.is_symlink, entry.is_file
            self._is_dir = entry.is_dir

        def is_dir(self) -> bool:
            if self.name == "bee":
                raise OSError(5, "Input/output error")
            return self._is_dir()

    @contextmanager
    def failing(path: object) -> Iterator[list[Entry]]:
        with scandir(str(path)) as entries:
            yield [Entry(entry) for entry in entries]

    monkeypatch.setattr(os, "scandir", failing)
    for stage in ("fit", "predict"):
        with pytest.raises(OSError, match=r"bee'.*Input/output error"):
            data(root).setup(stage)


def test_pipes_and_sockets_among_the_images_are_named_and_never_opened(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for split in ("train", "val"):
        image_folder(root / split, {"ant": 3, "bee": 3})
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    os.mkfifo(root / "val" / "bee" / "notes")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.bind(str(root / "val" / "bee" / "socket.png"))
    skipped = pytest.warns(UserWarning, match="skipped: 1 without an ending")
    with skipped, pytest.raises(ImageError) as caught:
        data(root).setup("fit")
    message = str(caught.value)
    assert message.startswith("2 of 14 images in ")
    assert "'train/ant/pipe.png' (it is a FIFO, not a regular file)" in message
    assert "'val/bee/socket.png' (it is a socket, not a regular file)" in message


def test_missing_folder_beside_links_or_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "fotos").symlink_to(image_folder(tmp_path / "elsewhere" / "photos", {"ant": 3, "bee": 3}))
    with pytest.raises(FileNotFoundError, match=r"photos' does not exist: .*did you mean 'fotos'"):
        _ = data(tmp_path / "photos").class_names
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="photos' does not exist; give another one"):
        _ = data(tmp_path / "empty" / "photos").class_names


# Hidden folders -------------------------------------------------------------------------------------------------------


def test_hidden_folders_of_the_user_are_counted_and_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"ant": 3, "bee": 3, "..x": 2, ".git": 1, ".ipynb_checkpoints": 1, "@eaDir": 1})
    save_image(root / "bee" / ".old" / "deep" / "x.png", 0)
    (root / ".empty").mkdir()
    message = r"skipped: '\.\.x' \(2 images\), 'bee/\.old' \(1 image\); rename"
    with pytest.warns(UserWarning, match=message):
        _ = data(root).splits
    with pytest.warns(UserWarning, match=message):
        assert len(data(root).predict_files) == 6
    split = tmp_path / "split"
    for name in ("train", "val"):
        image_folder(split / name, {"ant": 3, "bee": 3, ".cat": 2})
    with pytest.warns(UserWarning, match=r"skipped: 'train/\.cat' \(2 images\), 'val/\.cat' \(2 images\); rename"):
        _ = data(split).splits


# Names that look the same ---------------------------------------------------------------------------------------------


def forms(name: str) -> tuple[str, str]:
    return unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)


def test_composed_and_decomposed_names_are_one_class_across_splits(tmp_path: Path) -> None:
    composed, decomposed = forms("caf\u00e9")
    assert composed != decomposed
    image_folder(tmp_path / "train", {decomposed: 4, "th\u00e9": 4, "zoo": 4})
    image_folder(tmp_path / "val", {composed: 2, forms("th\u00e9")[1]: 2})
    module = data(tmp_path)
    assert module.class_names == (composed, "th\u00e9", "zoo")
    assert module.splits["train"].targets == [0] * 4 + [1] * 4 + [2] * 4
    assert module.splits["val"].targets == [0, 0, 1, 1]
    assert module.splits["train"].files[0] == f"train/{decomposed}/000.png", "paths stay as they are on the disk"
    module.setup("fit")


def test_composed_and_decomposed_folders_in_one_split_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = forms("caf\u00e9")
    module = data(image_folder(tmp_path, {composed: 4, decomposed: 3, "bee": 4}))
    assert module.class_names == ("bee", composed)
    files = {file: target for samples in module.splits.values() for file, target in zip(*samples, strict=True)}
    assert sorted(files.values()) == [0] * 4 + [1] * 7
    assert {file.split("/")[0] for file, target in files.items() if target == 1} == {composed, decomposed}


def test_classes_of_a_decomposed_checkpoint_are_found_in_composed_folders(tmp_path: Path) -> None:
    """An earlier version wrote the names of the folders, as they were, into checkpoints."""
    composed, decomposed = forms("caf\u00e9")
    module = data(image_folder(tmp_path, {composed: 3, "bee": 3}), test_fraction=1)
    module.class_names = ("bee", decomposed)
    assert module.splits["test"].targets == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("train", "val"), [("Cat", "cat"), ("cat", "cat ")])
def test_name_that_differs_by_case_or_space_is_shown_with_the_one_that_was_meant(
    train: str, val: str, tmp_path: Path
) -> None:
    image_folder(tmp_path / "train", {train: 3, "dog": 3})
    image_folder(tmp_path / "val", {val: 3, "dog": 3})
    with pytest.raises(ValueError, match=f"unknown class '{val}'; did you mean '{train}'.*rename the folder"):
        _ = data(tmp_path).splits
