"""A data module that resumes training within an epoch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from tl_lightning.batch import ImageSource
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance, check_resumed_images, check_unseen
from tl_lightning.data.sampler import DistributedBatchSampler

_SCORED_SPLITS = {"validate": "val", "test": "test"}


class ResumableDataModule(ImageSource, LightningDataModule, ABC):
    """Save the position in the training data and the identity of the training images in checkpoints.

    A resumed run continues with the next batch. A run on other images is refused, and so is a score on training images.
    A subclass sets the attributes and returns an :class:`EpochLoader` from each ``*_dataloader`` hook: built on
    :meth:`make_batch_sampler`, and in ``train_dataloader`` passed through :meth:`register_train_loader`.
    """

    root: Path
    """Folder of the images, for messages."""
    batch_size: int
    """Samples per batch and process."""
    seed: int
    """Seed of the order of the training data."""
    _train_loader: EpochLoader | None = None
    _resume_position: dict[str, int] | None = None

    @abstractmethod
    def provenance(self) -> Provenance:
        """Return the identity of the training images."""

    @abstractmethod
    def image_ids(self, split: str) -> Tensor:
        """Return a number for each image of a split (N,), int64, that identifies the image in later runs."""

    def training_files(self) -> Sequence[str]:
        """Return the training images, in the order of their IDs, for messages; empty if they have no names."""
        return ()

    def make_batch_sampler(self, length: int, *, shuffle: bool) -> DistributedBatchSampler:
        """Make the batch sampler of this rank.

        Args:
            length: Number of samples of the split.
            shuffle: Draw a new order for each epoch, as in training.
        """
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        sampler = DistributedBatchSampler(
            length, self.batch_size, shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size
        )
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler.fixed_order = overfit and shuffle
        return sampler

    def register_train_loader(self, loader: EpochLoader) -> EpochLoader:
        """Save the position of a training loader in checkpoints, and restore it from a loaded one."""
        self._train_loader = loader
        if self._resume_position is not None:
            loader.load_state_dict(self._resume_position)
        return loader

    def setup(self, stage: str) -> None:
        """Forget the position of an earlier run; the checkpoint of a resumed run is loaded after this hook."""
        if stage == "fit":
            self._train_loader = self._resume_position = None

    def teardown(self, stage: str) -> None:
        """Forget the position of the checkpoint, which belongs to one run."""
        self._resume_position = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data and the identity of the training images, for a checkpoint.

        Lightning saves the state of the loader too. It does not restore that state if the length of the run was
        computed before, as a scheduler does (lightning.pytorch.loops.fit_loop, ``setup_data`` returns early).
        """
        position = None if self._train_loader is None else self._train_loader.state_dict()
        return {"place": position, "images": self.provenance()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the training data, and check that the images fit the checkpoint.

        Raises:
            ValueError: The checkpoint was trained on other images, or on images that are to be scored.
        """
        running = None if self.trainer is None else self.trainer.state.fn
        if running in _SCORED_SPLITS:
            scored = self.image_ids(_SCORED_SPLITS[running])
            check_unseen(state_dict["images"], self.provenance(), scored, self.root)
        if running == "fit":
            check_resumed_images(state_dict["images"], self.provenance(), self.root, self.training_files())
            self._resume_position = state_dict["place"]
            if self._train_loader is not None and self._resume_position is not None:
                self._train_loader.load_state_dict(self._resume_position)
