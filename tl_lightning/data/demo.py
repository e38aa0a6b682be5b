"""Demo data: real images from an installed package, so that no download is needed."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from tl_lightning.data.image_folder import ImageFolderDataModule
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.paths import cache_folder

_CLASSES = {
    2: ("defective", "functional"),
    4: ("0_functional", "1_possibly_defective", "2_probably_defective", "3_defective"),
}


class SolarCellsDataModule(ImageFolderDataModule):
    """Serve 2,624 electroluminescence images of solar cells, 300 x 300 pixels, functional or defective.

    The images come from the package ``elpv-dataset`` (Deitsch et al. 2019,
    https://doi.org/10.1016/j.solener.2019.02.067; CC BY-NC-SA 4.0). They are copied once into a folder of class folders
    and served like any other such folder. Experts gave each cell a probability of being defective: 0, 1/3, 2/3 or 1.
    With two classes, 2/3 and 1 are ``defective``.

    Args:
        classes: 2, or 4 for one class per probability.
        root: Folder for the copied images; None takes the user's cache folder.
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load images, per training process; None chooses by the number of CPUs.
        augment: Train on random crops and flips of the images.
        min_crop: Smallest share of a cell's area that a random crop keeps.
        val_fraction: Share of the images for validation.
        test_fraction: Share of the images for testing.
        seed: Seed of the split, the order and the augmentation; None takes the seed of ``seed_everything``, otherwise
            42.
        preprocessing: Preprocessing that the backbone expects: ``backbone.preprocessing``. The command line fills it
            in.

    Raises:
        ValueError: ``classes`` is neither 2 nor 4, or a fraction, the crop or the batch size is out of range.
    """

    def __init__(
        self,
        classes: int = 2,
        root: str | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        augment: bool = True,
        min_crop: float = 0.5,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if classes not in _CLASSES:
            raise ValueError(f"classes is {classes}; the solar cells come in 2 or 4 classes")
        folder = Path(root) if root is not None else cache_folder() / f"solar_cells_{classes}"
        super().__init__(
            str(folder),
            batch_size=batch_size,
            num_workers=num_workers,
            augment=augment,
            flip="both",  # a cell has no upside
            min_crop=min_crop,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            preprocessing=preprocessing,
        )
        self.classes = classes
        self.class_names = _CLASSES[classes]

    def prepare_data(self) -> None:
        """Copy the images into class folders, unless an earlier run has done so.

        Raises:
            ModuleNotFoundError: The package with the images is not installed.
            FileExistsError: The root holds other files.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.root}.lock"):
            if not self.root.exists():
                _copy_images(self.root, self.classes)
        found = tuple(sorted(entry.name for entry in self.root.iterdir()))
        if found != self.class_names:
            raise FileExistsError(
                f"{str(self.root)!r} does not hold the solar cells in {self.classes} classes, but {', '.join(found)}; "
                "give another root, or remove this one"
            )

    def setup(self, stage: str) -> None:
        """Copy the images if Lightning has not called :meth:`prepare_data`, then list them."""
        if not self.root.exists():
            self.prepare_data()
        super().setup(stage)


def _copy_images(root: Path, classes: int) -> None:
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the solar cells come with the package 'elpv-dataset', which is not installed: run 'pip install "
            "elpv-dataset', or install tl_lightning with its extra 'demo'"
        )
    data = Path(found.origin).parent / "data"
    unfinished = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    for name in _CLASSES[classes]:
        (unfinished / name).mkdir()
    for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines():
        image, probability, _cell_type = line.split()
        number = round(float(probability) * 3)
        name = _CLASSES[4][number] if classes == 4 else _CLASSES[2][0 if number >= 2 else 1]
        shutil.copyfile(data / image, unfinished / name / Path(image).name)
    unfinished.chmod(0o755)
    unfinished.rename(root)  # atomic: no other process ever sees an incomplete folder
