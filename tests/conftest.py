import os
from pathlib import Path

import pytest

# Set before torch is imported, because tests run in parallel with one core each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.doubles import image_folder


@pytest.fixture(autouse=True)
def _clear_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the seed that an earlier test left in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of three classes with 41 images in total."""
    return image_folder(tmp_path_factory.mktemp("data") / "photos", {"ant": 12, "bee": 16, "cat": 13})
