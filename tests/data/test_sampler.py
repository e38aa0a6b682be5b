import pytest
import torch

from tl_lightning.data.sampler import DistributedBatchSampler


def epoch(batches: DistributedBatchSampler, number: int) -> list[list[int]]:
    batches.set_epoch(number)
    return [[key.index for key in batch] for batch in batches]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 33, 64, 65])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_sample_comes_once_and_ranks_stay_in_step(length: int, world: int, shuffle: bool, size: int) -> None:
    ranks = [DistributedBatchSampler(length, size, shuffle=shuffle, rank=r, world_size=world) for r in range(world)]
    shapes = [[len(batch) for batch in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes), "ranks differ in number or size of batches"
    assert len(shapes[0]) == len(ranks[0])
    keys = [key for rank in ranks for batch in rank for key in batch]
    real = [key.index for key in keys if not key.padding]
    assert set(real) == set(range(length))
    if shuffle:
        assert len(real) - length < world * (1 + (length < world)), "more repeated than it takes to fill up the ranks"
    else:
        assert sorted(real) == list(range(length)), "a sample counts twice"
    assert max(shapes[0]) <= size + (shuffle and size > 1)
    if shuffle and size > 1 and length > world:
        assert min(shapes[0]) > 1, "batch norm cannot train on one sample"


def test_order_depends_only_on_seed_and_epoch() -> None:
    one, other = (DistributedBatchSampler(50, 7, shuffle=True, seed=3) for _ in range(2))
    orders = [epoch(one, e) for e in (0, 1, 2)]
    assert epoch(other, 2) == orders[2]
    assert epoch(other, 0) == orders[0]
    assert len({str(order) for order in orders}) == 3
    assert epoch(DistributedBatchSampler(50, 7, shuffle=True, seed=4), 0) != orders[0]


def test_ranks_divide_the_global_batches_of_one_process() -> None:
    single = epoch(DistributedBatchSampler(48, 8, shuffle=True, seed=1), 5)
    halves = [epoch(DistributedBatchSampler(48, 4, shuffle=True, seed=1, rank=r, world_size=2), 5) for r in (0, 1)]
    assert single == [first + second for first, second in zip(*halves, strict=True)]


def test_evaluation_keeps_the_order_of_the_index_on_all_ranks() -> None:
    ranks = [DistributedBatchSampler(11, 2, shuffle=False, rank=r, world_size=3) for r in range(3)]
    together = [key.index for batch in zip(*ranks, strict=True) for part in batch for key in part if not key.padding]
    assert together == list(range(11))


def test_shuffling_is_uniform() -> None:
    batches = DistributedBatchSampler(5, 5, shuffle=True)
    first = torch.tensor([epoch(batches, e)[0][0] for e in range(2000)]).bincount()
    assert first.min() > 330
