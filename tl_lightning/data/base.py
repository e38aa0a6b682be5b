"""A data module whose training can be left in the middle of an epoch and taken up again there."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from tl_lightning.batch import ImageSource
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance, check_resumed_images, check_unseen
from tl_lightning.data.sampler import DistributedBatchSampler

_SCORED = {"validate": "val", "test": "test"}


class ResumableDataModule(ImageSource, LightningDataModule):
    """A data module that keeps its place in the training data, and which images these are, in checkpoints."""

    root: Path
    """What messages call the data."""
    batch_size: int
    seed: int
    _train_loader: EpochLoader | None = None
    _resume_at: dict[str, int] | None = None

    @abstractmethod
    def provenance(self) -> Provenance:
        """Return what identifies the training images."""

    @abstractmethod
    def identify(self, split: str) -> Tensor:
        """Return a number for each image of a split (N,), int64, by which it is known again."""

    def order(self, length: int, *, shuffle: bool) -> DistributedBatchSampler:
        """Return the batches of this process.

        Args:
            length: Number of samples.
            shuffle: Whether it is for training.
        """
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        batches = DistributedBatchSampler(
            length, self.batch_size, shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size
        )
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Lightning sets it
        batches.repeat_first_epoch = overfit and shuffle
        return batches

    def train_on(self, loader: EpochLoader) -> EpochLoader:
        """Note what training iterates, and take it to the place of a checkpoint."""
        self._train_loader = loader
        if self._resume_at is not None:
            loader.load_state_dict(self._resume_at)
        return loader

    def setup(self, stage: str) -> None:
        """Forget the place of another run, which may have been interrupted; that of a resumed one is loaded after this."""
        if stage == "fit":
            self._train_loader = self._resume_at = None

    def teardown(self, stage: str) -> None:
        """Forget the place of a checkpoint, which was that of one run."""
        self._resume_at = None

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the split, and the place in the training data, for a checkpoint.

        Lightning asks the loader for its place as well, but does not give it back where the length of the run was asked
        for before, as a schedule does (lightning.pytorch.loops.fit_loop, ``setup_data`` returns early).
        """
        place = None if self._train_loader is None else self._train_loader.state_dict()
        return {"place": place, "images": self.provenance()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place in the training data, and make sure that what was trained on is not what is tested on.

        Raises:
            ValueError: The checkpoint was trained on other images, or on those that are to be scored.
        """
        doing = None if self.trainer is None else self.trainer.state.fn
        if doing in _SCORED:
            check_unseen(state_dict["images"], self.provenance(), self.identify(_SCORED[doing]), self.root)
        if doing == "fit":
            check_resumed_images(state_dict["images"], self.provenance(), self.root)
            self._resume_at = state_dict["place"]
            if self._train_loader is not None and self._resume_at is not None:
                self._train_loader.load_state_dict(self._resume_at)
