import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side, a core each

from tests.doubles import image_folder


@pytest.fixture(autouse=True)
def _clean_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed nothing from one test to the next."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, 41 images in all."""
    return image_folder(tmp_path_factory.mktemp("data") / "photos", {"ant": 12, "bee": 16, "cat": 13})
