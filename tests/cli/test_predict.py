"""``predict`` classifies folders of images, nested or flat, by a checkpoint alone."""

import csv
from pathlib import Path

import pytest
import torch

from tests.cli.runs import Run
from tests.doubles import save_image
from tl_lightning.cli import main
from tl_lightning.images import ImageError, read_image
from tl_lightning.modules import TransferClassifier
from tl_lightning.transforms import eval_transform


def predict(run: Run, root: Path, runs: Path, *options: str) -> list[dict[str, str]]:
    main(["predict", f"--data.root={root}", f"--ckpt_path={run.best}", f"--trainer.default_root_dir={runs}", *options])
    (table,) = runs.rglob("predictions.csv")
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


def test_flat_folder_predicts_the_classes_of_the_checkpoint(trained: Run, tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee", "cat") * 8):
        save_image(tmp_path / "flat" / f"{number:02d} {name}, new.png", seed=9000 + number, colour=number % 3)
    rows = predict(trained, tmp_path / "flat", tmp_path / "runs", "--data.batch_size=5", "--data.num_workers=0")
    assert list(rows[0]) == ["path", "class_name", "probability", "ant", "bee", "cat"]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert len(rows) == 24
    right = sum(row["class_name"] in row["path"] for row in rows)
    assert right >= 20, f"{right} of 24"
    model = TransferClassifier.load_from_checkpoint(trained.best)
    transform = eval_transform(model.backbone.preprocessing)
    for row in rows[:7]:
        with torch.no_grad():
            expected = model(transform(read_image(tmp_path / "flat" / row["path"]))[None]).softmax(1)[0].tolist()
        given = [float(row[name]) for name in ("ant", "bee", "cat")]
        assert given == pytest.approx(expected, abs=1e-5)
        assert float(row["probability"]) == max(given)


def test_nested_folder_keeps_its_paths_with_the_default_number_of_workers(
    trained: Run, photos: Path, tmp_path: Path
) -> None:
    rows = predict(trained, photos, tmp_path)
    assert len(rows) == 41
    assert rows[0]["path"] == "ant/000.png"
    assert sum(row["path"].startswith(row["class_name"]) for row in rows) > 30


def test_bad_image_fails_the_command_and_leaves_all_other_rows(trained: Run, tmp_path: Path) -> None:
    for number in range(9):
        save_image(tmp_path / "flat" / f"{number}.png", seed=number, colour=number % 3)
    (tmp_path / "flat" / "4.png").write_bytes(b"")
    with pytest.raises(
        ImageError, match=r"^1 of 9 images cannot be read and have no row in '.*': '4\.png'; unreadable"
    ):
        predict(trained, tmp_path / "flat", tmp_path / "runs", "--data.batch_size=2", "--data.num_workers=1")
    rows = (tmp_path / "runs" / "version_0" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert [row.partition(",")[0] for row in rows] == ["path", *(f"{number}.png" for number in range(9) if number != 4)]
    bad = (tmp_path / "runs" / "version_0" / "unreadable.csv").read_text(encoding="utf-8").splitlines()
    assert bad == ["path,reason", "4.png,it is empty"]
