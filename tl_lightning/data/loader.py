"""A loader that can be left in the middle of an epoch and taken up again there."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from tl_lightning.batch import Batch, EqualBatches
from tl_lightning.data.sampler import DistributedBatchSampler

_NOWHERE = (-1, 0)


class EpochLoader(EqualBatches, ABC):
    """Iterate the batches of an epoch; the state counts the batches that were handed out, not those prefetched.

    This is no ``torch.utils.data.DataLoader``, so that Lightning leaves its order alone: Lightning would shuffle it, cut
    it among the ranks and pad it in its own way.

    Args:
        batches: The order.
    """

    def __init__(self, batches: DistributedBatchSampler) -> None:
        self.sampler = self.batch_sampler = batches  # where Lightning looks for set_epoch, and for shuffling
        self._consumed, self._epoch = 0, 0
        self._resume_at = _NOWHERE

    @abstractmethod
    def produce(self) -> Iterator[Batch]:
        """Make the batches of :attr:`sampler`, from the one at which it starts on."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of the epoch, or over those that are left of it after a state was loaded."""
        # A generator: it looks at the epoch when the first batch is asked for, since Lightning makes the iterator of a
        # resumed run before it says which epoch it is.
        (epoch, consumed), self._resume_at = self._resume_at, _NOWHERE
        self._epoch = self.sampler.epoch
        self._consumed = self.sampler.start = consumed if epoch == self._epoch else 0
        for batch in self.produce():
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, how many of its batches were handed out, and what the order of the rest depends on."""
        consumed = self._consumed if self._epoch == self.sampler.epoch else 0  # else the epoch has yet to begin
        return {"epoch": self.sampler.epoch, "batches": consumed, "of": len(self)} | self.sampler.order

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of a saved state, if its epoch comes next.

        Raises:
            ValueError: The state lies within an epoch, whose rest would be other batches now.
        """
        changed = [
            f"{name} was {state[name]} and is {now}"
            for name, now in self.sampler.order.items()
            if state.get(name, now) != now
        ]
        if changed and 0 < state["batches"] < state.get("of", len(self)):
            raise ValueError(
                f"the checkpoint was written within epoch {state['epoch']}, and the rest of that epoch would be other batches "
                f"now: {'; '.join(changed)}. Resume with what it was, or from a checkpoint at the end of an epoch"
            )
        self._resume_at = (state["epoch"], state["batches"])
        self._consumed, self._epoch = state["batches"], state["epoch"]
        self.sampler.set_epoch(state["epoch"])
