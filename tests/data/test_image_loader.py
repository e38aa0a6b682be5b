from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tl_lightning.batch import PADDING, Batch
from tl_lightning.data.image_loader import ImageDataset, ImageLoader, load_with_threads, load_with_workers
from tl_lightning.data.sampler import DistributedBatchSampler, SampleKey


def read(index: int) -> Tensor:
    return torch.full((3, 4, 4), index, dtype=torch.uint8)


def add_noise(image: Tensor) -> Tensor:
    return image.float() + torch.rand(())


def loader(workers: int = 0, *, shuffle: bool = True, length: int = 23, rank: int = 0, world: int = 1) -> ImageLoader:
    dataset = ImageDataset(read, [i % 3 for i in range(length)], add_noise, seed=5)
    batches = DistributedBatchSampler(length, 4, shuffle=shuffle, seed=5, rank=rank, world_size=world)
    return ImageLoader(dataset, batches, num_workers=workers, pin_memory=False)


def values(batches: Iterator[Batch]) -> list[list[float]]:
    return [batch.inputs[:, 0, 0, 0].tolist() for batch in batches]


def test_batches_are_the_same_with_any_number_of_workers() -> None:
    loaders = [loader(workers) for workers in (0, 1, 2)]
    for epoch in (0, 1):
        for each in loaders:
            each.sampler.set_epoch(epoch)
        first, *others = [values(iter(each)) for each in loaders]
        assert all(other == first for other in others), epoch


def test_threads_load_the_same_images_as_worker_processes() -> None:
    dataset = ImageDataset(read, None, lambda image: image.float(), seed=5)
    batches = [[SampleKey(i, 0, False) for i in part] for part in ([4, 0, 7], [2], [9, 9, 1, 3])]
    by_threads, by_processes = load_with_threads(dataset, batches), load_with_workers(dataset, batches, 1)
    for mine, theirs, keys in zip(by_threads, by_processes, batches, strict=True):
        assert torch.equal(mine, theirs)
        assert mine[:, 0, 0, 0].tolist() == [key.index for key in keys]


def test_augmentation_depends_only_on_epoch_and_sample() -> None:
    each = loader()
    seen: dict[tuple[int, int], float] = {}
    for epoch in (0, 1, 0):
        each.sampler.set_epoch(epoch)
        for batch in each:
            for index, value in zip(batch.index.tolist(), batch.inputs[:, 0, 0, 0].tolist(), strict=True):
                assert seen.setdefault((epoch, index), value) == value
    assert len(set(seen.values())) == 46


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_after", [0, 1, 4, 6])
def test_state_counts_the_batches_handed_out(workers: int, stop_after: int) -> None:
    whole = loader(workers)
    whole.sampler.set_epoch(2)
    expected = values(iter(whole))
    stopped = loader(workers)
    stopped.sampler.set_epoch(2)
    iterator = iter(stopped)
    for _ in range(stop_after):
        next(iterator)
    state = stopped.state_dict()
    order = {"seed": 5, "batch_size": 4, "processes": 1, "images": 23}
    assert stop_after == 0 or state == {"epoch": 2, "batches": stop_after, "of": 6} | order
    resumed = loader(workers)
    resumed.load_state_dict(state)
    remaining = iter(resumed)  # Lightning makes the iterator before it sets the epoch
    resumed.sampler.set_epoch(2)
    assert values(remaining) == expected[stop_after:]
    resumed.sampler.set_epoch(3)
    whole.sampler.set_epoch(3)
    assert values(iter(resumed)) == values(iter(whole)), "the next epoch is whole again"


def test_state_survives_being_loaded_and_saved_at_once() -> None:
    each = loader()
    state = {"epoch": 3, "batches": 2, "of": 6, "seed": 5, "batch_size": 4, "processes": 1, "images": 23}
    each.load_state_dict(state)
    assert each.state_dict() == state


@pytest.mark.parametrize(("name", "was"), [("batch_size", 8), ("seed", 6), ("processes", 2), ("images", 24)])
def test_rest_of_an_epoch_in_another_order_is_refused(name: str, was: int) -> None:
    state = loader().state_dict() | {"epoch": 3, "batches": 2, name: was}
    with pytest.raises(ValueError, match=rf"within epoch 3.*{name} was {was} and is .*end of an epoch"):
        loader().load_state_dict(state)
    loader().load_state_dict(state | {"batches": 6})


def test_position_is_restored_once() -> None:
    each = loader()
    each.load_state_dict(each.state_dict() | {"epoch": 3, "batches": 2})
    assert len(values(iter(each))) == len(each) - 2
    assert len(values(iter(each))) == len(each)


def test_state_of_a_finished_epoch_does_not_shorten_the_next() -> None:
    each = loader()
    each.load_state_dict(each.state_dict() | {"epoch": 0, "batches": 6})
    each.sampler.set_epoch(1)
    assert len(values(iter(each))) == len(each)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    values(iter(loader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_is_marked() -> None:
    parts = [loader(shuffle=False, length=7, rank=r, world=2) for r in (0, 1)]
    indices = torch.cat([batch.index for part in parts for batch in part])
    assert sorted(indices[indices != PADDING].tolist()) == list(range(7))
    assert (indices == PADDING).sum() == 1


def test_batch_contract() -> None:
    batch = next(iter(loader()))
    assert isinstance(batch, Batch)
    assert batch.inputs.shape == (4, 3, 4, 4)
    assert batch.target.dtype == batch.index.dtype == torch.int64
    assert batch.boundary is None
