"""The quickstart reaches its accuracy on real images, with real weights."""

import csv
from pathlib import Path

import pytest

from tl_lightning.cli import main

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def accuracy(seed: int, cells: Path, runs: Path) -> float:
    main(
        [
            "fit",
            f"--config={CONFIG}",
            f"--seed_everything={seed}",
            f"--data.images.root={cells}",
            f"--trainer.default_root_dir={runs / str(seed)}",
            f"--data.cache_dir={cells}-features",
            "--trainer.enable_progress_bar=false",
        ]
    )
    rows = csv.DictReader((runs / str(seed) / "version_0" / "metrics.csv").read_text().splitlines())
    (tested,) = [float(row["test_accuracy"]) for row in rows if row["test_accuracy"]]
    return tested


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_accuracy_on_the_solar_cells(tmp_path: Path) -> None:
    """Logistic regression on the same features, its C chosen on a validation part, has 0.850 (sd 0.011 over splits)."""
    scores = {seed: accuracy(seed, tmp_path / "cells", tmp_path) for seed in (42, 0, 1, 2, 3, 4)}
    print(scores)
    assert scores[42] >= 0.83, scores
    assert sum(scores[seed] for seed in range(5)) / 5 >= 0.845, scores
