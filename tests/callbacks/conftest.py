from pathlib import Path

import pytest

from tests.callbacks.images import PHOTOS
from tests.doubles import image_folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, 21 images in all."""
    return image_folder(tmp_path_factory.mktemp("data") / "photos", PHOTOS)
