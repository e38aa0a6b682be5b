"""``predictions.csv`` holds a row for each image that can be read, and its cells are exact and harmless."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.doubles import TinyBackbone, save_image
from tests.ranks import run_on_ranks
from tests.staged import images, trainer
from tl_lightning.callbacks import PredictionWriter
from tl_lightning.data import CachedFeaturesDataModule
from tl_lightning.data._image_check import check_images
from tl_lightning.images import ImageError
from tl_lightning.modules import LinearProbe
from tl_lightning.utils.spreadsheet import unquote_formula

CLASSES = ("ant", "bee", "cat")
BAD = ("a/empty.png", "a/text.jpg", "b/half.png", "b/link.png", "b/pipe.png", "c/09.png")


def probe(class_names: tuple[str, ...] = CLASSES) -> LinearProbe:
    torch.manual_seed(3)
    return LinearProbe(TinyBackbone(), len(class_names), class_names)


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        return list(csv.DictReader(opened))


def good_images(root: Path, count: int = 21) -> Path:
    for number in range(count):
        save_image(root / f"{'abc'[number % 3]}/{number:02d}.png", number, number)
    return root


def add_bad_images(root: Path) -> Path:
    whole = (root / "a/00.png").read_bytes()
    (root / "a/empty.png").touch()
    (root / "a/text.jpg").write_text("no image")
    (root / "b/half.png").write_bytes(whole[: len(whole) // 2])
    (root / "b/link.png").symlink_to(root / "b" / "gone.png")
    os.mkfifo(root / "b/pipe.png")
    return root


def predict(root: Path, folder: Path, **options: Any) -> list[dict[str, str]]:
    trainer(folder, PredictionWriter()).predict(probe(), images(root, **options), return_predictions=False)
    return read_table(folder / "predictions.csv")


# Images that cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_cost_no_other_row(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = good_images(tmp_path / "photos")
    expected = predict(root, tmp_path / "good", batch_size=4)
    add_bad_images(root)
    (root / "c" / "09.png").mkdir()
    with pytest.raises(ImageError) as caught:
        predict(root, tmp_path / "bad", batch_size=4, num_workers=workers)
    rows = read_table(tmp_path / "bad" / "predictions.csv")
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    for row, right in zip(rows, expected, strict=True):
        assert row["class_name"] == right["class_name"]
        for name in ("probability", *CLASSES):
            assert float(row[name]) == pytest.approx(float(right[name]), rel=1e-4)
    bad = read_table(tmp_path / "bad" / "unreadable.csv")
    assert [row["path"] for row in bad] == list(BAD[:-1])
    assert [row["reason"] for row in bad] == [
        "it is empty",
        "it is not an image, or its format is unknown",
        bad[2]["reason"],
        "the link leads to nothing",
        "it is a FIFO, not a regular file",
    ]
    assert "truncated" in bad[2]["reason"]
    message = str(caught.value)
    assert message.startswith("5 of 26 images cannot be read and have no row in ")
    for name in BAD[:-1]:
        assert repr(name) in message
    printed = " ".join(capsys.readouterr().out.split())
    assert "images 21 " in printed
    assert "not read 5, " in printed


def test_folder_in_which_no_image_can_be_read_gives_an_empty_table(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.png").touch()
    with pytest.raises(ImageError, match=r"12 of 12 images .*'00\.png', .*'09\.png' and 2 more; unreadable\.csv"):
        predict(tmp_path, tmp_path)
    assert read_table(tmp_path / "predictions.csv") == []
    assert len(read_table(tmp_path / "unreadable.csv")) == 12


def test_prediction_without_a_table_still_refuses_a_bad_image(tmp_path: Path) -> None:
    """Otherwise the caller would get a row of probabilities of an image that is not there."""
    root = add_bad_images(good_images(tmp_path / "photos"))
    data = images(root)
    with pytest.raises(ImageError, match="5 of 26"):
        trainer(tmp_path, PredictionWriter()).predict(probe(), data)
    with pytest.raises(ImageError, match="cannot read the image"):
        trainer(tmp_path).predict(probe(), data)


def test_images_are_predicted_around_a_bad_one_with_cached_features(tmp_path: Path) -> None:
    root = add_bad_images(good_images(tmp_path / "photos"))
    data = CachedFeaturesDataModule(images(root), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ImageError, match="5 of 26"):
        trainer(tmp_path, PredictionWriter()).predict(probe(), data, return_predictions=False)
    assert len(read_table(tmp_path / "predictions.csv")) == 21


class Stop(pl.Callback):
    """Fail in the third batch."""

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if args[1] == 2:
            raise RuntimeError("stop")


def test_rows_that_are_done_survive_an_error(tmp_path: Path) -> None:
    root = good_images(tmp_path / "photos")
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, PredictionWriter(), Stop()).predict(probe(), images(root, batch_size=4))
    assert [row["path"] for row in read_table(tmp_path / "predictions.partial.csv")] == [
        *("a/00.png", "a/03.png", "a/06.png", "a/09.png", "a/12.png", "a/15.png", "a/18.png", "b/01.png")
    ]
    assert not list(tmp_path.glob("predictions.csv*"))


def predict_on_rank(photos: str, folder: str, world: int) -> list[str]:
    messages = []
    common = {"accelerator": "cpu", "devices": world, "strategy": "ddp", "enable_progress_bar": False, "logger": False}
    writer = pl.Trainer(default_root_dir=folder, callbacks=[PredictionWriter()], **common)  # type: ignore[arg-type]
    with pytest.raises(ImageError) as caught:
        writer.predict(probe(), images(photos, batch_size=2, num_workers=1), return_predictions=False)
    messages.append(str(caught.value))
    with pytest.raises(ImageError) as caught:  # the ranks are still connected
        check_images(Path(photos), ["a/00.png", "a/03.png", "a/06.png", "a/empty.png", "b/01.png"])
    return [*messages, str(caught.value)]


def test_bad_images_on_one_rank_alone_cost_no_row_and_no_rank_waits(tmp_path: Path) -> None:
    root = good_images(tmp_path / "photos")
    (root / "a/empty.png").touch()  # in the second batch of four, the second two of which are on rank 1
    first, second = run_on_ranks(__name__, "predict_on_rank", tmp_path / "out", photos=str(root), folder=str(tmp_path))
    assert first == second
    assert "1 of 22 images cannot be read" in first[0]
    assert "1 of 5 images" in first[1]
    assert "'a/empty.png' (it is empty)" in first[1]
    rows = read_table(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == sorted(str(path.relative_to(root)) for path in root.rglob("[0-9]*.png"))
    assert [row["path"] for row in read_table(tmp_path / "unreadable.csv")] == ["a/empty.png"]


# Cells ----------------------------------------------------------------------------------------------------------------


def test_names_that_are_columns_or_formulas_are_exact_after_reading_them_back(tmp_path: Path) -> None:
    names = (
        "path",
        "probability",
        "class_name",
        'a, "b"',
        "line\nfeed",
        "=1+1",
        "'=x",
        "  ",
        "-2",
        "@a",
        "probability of path",
    )
    files = ["+cmd.png", "'=x.png", "-1/=2.png", 'plain, "x".png', "\tt.png"]
    for number, file in enumerate(files):
        save_image(tmp_path / "photos" / file, number)
    data = images(tmp_path / "photos")
    trainer(tmp_path, PredictionWriter()).predict(probe(names), data, return_predictions=False)
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as opened:
        header, *rows = list(csv.reader(opened))
    assert header[:3] == ["path", "class_name", "probability"]
    assert len(set(header)) == 3 + len(names)
    assert [unquote_formula(cell) for cell in header[3:]] == [
        *("probability of probability of path", "probability of probability", "probability of class_name"),
        *names[3:],
    ]
    assert sorted(unquote_formula(row[0]) for row in rows) == sorted(files)
    for row in [header, *rows]:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)
    for row in rows:
        best = max(range(len(names)), key=lambda number: float(row[3 + number]))
        assert unquote_formula(row[1]) == names[best]
