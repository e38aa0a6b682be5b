"""A loader that resumes within an epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from tl_lightning.batch import Batch, EqualBatches
from tl_lightning.data.sampler import DistributedBatchSampler

_NO_POSITION = (-1, 0)


class EpochLoader(EqualBatches, ABC):
    """Iterate over the batches of an epoch; the state counts the batches handed out, not those prefetched.

    This is not a ``torch.utils.data.DataLoader``: Lightning would shuffle, distribute and pad one in its own way.

    Args:
        sampler: The batches of each epoch.
    """

    def __init__(self, sampler: DistributedBatchSampler) -> None:
        self.sampler = self.batch_sampler = sampler  # Lightning looks here for set_epoch, and for shuffling
        self._consumed, self._epoch = 0, 0
        self._resume_position = _NO_POSITION

    @abstractmethod
    def load_batches(self) -> Iterator[Batch]:
        """Yield the batches of :attr:`sampler` in its epoch, from its start on."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of the epoch; after a state was loaded, over the remaining ones."""
        # A generator reads the epoch at the first batch. Lightning makes the iterator of a resumed run before it sets
        # the epoch.
        (epoch, consumed), self._resume_position = self._resume_position, _NO_POSITION
        self._epoch = self.sampler.epoch
        self._consumed = self.sampler.start = consumed if epoch == self._epoch else 0
        for batch in self.load_batches():
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches handed out, and the settings that the other batches depend on."""
        consumed = self._consumed if self._epoch == self.sampler.epoch else 0  # otherwise the epoch has not begun yet
        return {"epoch": self.sampler.epoch, "batches": consumed, "of": len(self)} | self.sampler.order_settings

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches of a saved state, if its epoch comes next.

        Raises:
            ValueError: The state lies within an epoch, and the remaining batches would be other ones now.
        """
        changed = [
            f"{name} was {state[name]} and is {now}"
            for name, now in self.sampler.order_settings.items()
            if state.get(name, now) != now
        ]
        if changed and 0 < state["batches"] < state.get("of", len(self)):
            raise ValueError(
                f"the checkpoint was written within epoch {state['epoch']}, and the rest of that epoch would have "
                f"other batches now: {'; '.join(changed)}. Restore these settings, or resume from a checkpoint at the "
                "end of an epoch"
            )
        self._resume_position = (state["epoch"], state["batches"])
        self._consumed, self._epoch = state["batches"], state["epoch"]
        self.sampler.set_epoch(state["epoch"])
