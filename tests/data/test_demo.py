from collections import Counter
from pathlib import Path

import pytest

from tl_lightning.backbones import EfficientNetLite
from tl_lightning.data import ImageFolderDataModule, SolarCellsDataModule
from tl_lightning.images import read_image


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> SolarCellsDataModule:
    root = tmp_path_factory.mktemp("cells") / "two"
    module = SolarCellsDataModule(root=str(root), preprocessing=EfficientNetLite(weights=None).preprocessing)
    module.prepare_data()
    module.setup("fit")
    return module


def test_two_classes_follow_from_the_probability(two_classes: SolarCellsDataModule) -> None:
    assert two_classes.class_names == ("defective", "functional")
    counts = Counter(target for split in two_classes.splits.values() for target in split.targets)
    assert counts == {0: 821, 1: 1803}
    sizes = {name: len(samples.files) for name, samples in two_classes.splits.items()}
    assert sizes == {"train": 1837, "val": 262, "test": 525}


def test_root_is_an_ordinary_image_folder(two_classes: SolarCellsDataModule) -> None:
    plain = ImageFolderDataModule(str(two_classes.root), test_fraction=0.2)
    assert plain.splits == two_classes.splits
    assert plain.class_names == two_classes.class_names
    assert read_image(two_classes.root / plain.splits["train"].files[0]).shape == (3, 300, 300)


def test_second_prepare_data_writes_nothing(two_classes: SolarCellsDataModule) -> None:
    before = two_classes.root.stat().st_mtime_ns
    two_classes.prepare_data()
    assert two_classes.root.stat().st_mtime_ns == before
    assert [p.name for p in two_classes.root.parent.iterdir() if p.name.startswith(".two.")] == []


def test_four_classes_are_the_four_probabilities(tmp_path: Path) -> None:
    module = SolarCellsDataModule(classes=4, root=str(tmp_path / "four"), preprocessing=None)
    assert module.num_classes == 4
    module.prepare_data()
    counts = Counter(target for split in module.splits.values() for target in split.targets)
    assert counts == {0: 1508, 1: 295, 2: 106, 3: 715}


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="does not hold the solar cells in 2 classes, but mine; give"):
        SolarCellsDataModule(root=str(tmp_path)).prepare_data()


def test_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="in 2 or 4 classes"):
        SolarCellsDataModule(classes=3)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="extra 'demo'"):
        SolarCellsDataModule(root=str(tmp_path / "cells")).prepare_data()
