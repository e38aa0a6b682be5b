"""Runs that several tests of the command line read; a test that would change one copies it."""

from pathlib import Path

import pytest

from tests.cli.runs import PARTIAL, Run, recorded_fit


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A linear probe that has learned the classes of the photos."""
    options = ["--model.lr=0.05", "--data.val_fraction=0.3", "--trainer.max_epochs=15"]
    return recorded_fit(photos, tmp_path_factory.mktemp("trained") / "runs", *options)


@pytest.fixture(scope="session")
def short(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A partial fine-tuning of one epoch, in ``runs/version_0``."""
    return recorded_fit(photos, tmp_path_factory.mktemp("short") / "runs", *PARTIAL)
