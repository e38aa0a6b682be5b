"""A search chooses heads that learn, and reports scores without the optimism of the selection."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.heads.clouds import overlapping_clouds
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.evaluation import wilson_interval
from tl_lightning.heads import LinearHead, MLPHead
from tl_lightning.sweep.candidates import Candidate, HeadInput
from tl_lightning.sweep.search import LabelledFeatures, SearchResult, search
from tl_lightning.sweep.training import HeadOptions

GRID = [Candidate(LinearHead, HeadOptions(lr, decay)) for lr in (1e-4, 1e-3, 1e-2, 1e-1) for decay in (0.0, 0.1, 1.0)]


def pooled(features: Tensor, target: Tensor) -> LabelledFeatures:
    return LabelledFeatures({HeadInput(): features}, target)


def run_search(
    train: LabelledFeatures,
    val: LabelledFeatures,
    classes: int,
    seed: int = 0,
    candidates: Sequence[Candidate] = GRID,
    **options: object,
) -> SearchResult:
    arguments: dict[str, Any] = {
        "epochs": 3,
        "make_sampler": partial(DistributedBatchSampler, batch_size=32, shuffle=True, seed=seed),
        "rng_state": torch.Generator().manual_seed(seed).get_state(),
        "loss": nn.functional.cross_entropy,
    }
    return search(candidates, train, val, num_classes=classes, seed=seed, **(arguments | options))


@pytest.mark.parametrize("folds", [0, 5])
def test_head_that_learns_is_chosen(folds: int) -> None:
    features, target = overlapping_clouds(3, count=600)
    result = run_search(
        pooled(features[:400], target[:400]),
        pooled(features[400:], target[400:]),
        3,
        folds=folds,
    )
    best = result.accuracy.max()
    assert best - result.accuracy[result.chosen] < 0.04
    assert best - result.accuracy.min() > 0.1  # the grid has bad rates in it
    assert result.interval.low < result.accuracy[result.chosen] <= result.interval.high + 0.05


def test_simplest_has_fewest_parameters_then_largest_decay_then_lowest_rate() -> None:
    features, target = overlapping_clouds(2, count=300)
    features = features + 30 * torch.nn.functional.one_hot(target, 30)  # every head is right
    candidates = [
        Candidate(partial(MLPHead, hidden=(4,)), HeadOptions(1e-2, 1.0)),
        Candidate(LinearHead, HeadOptions(1e-2, 0.1)),
        Candidate(LinearHead, HeadOptions(1e-2, 1.0)),
        Candidate(LinearHead, HeadOptions(3e-3, 1.0)),
    ]
    half = pooled(features[:200], target[:200])
    result = run_search(half, pooled(features[200:], target[200:]), 2, candidates=candidates, epochs=20)
    assert (result.accuracy == 1).all()
    assert result.chosen == 3


def test_diverged_head_is_not_chosen() -> None:
    features, target = overlapping_clouds(2, count=300)
    target = torch.where(torch.arange(300) < 240, 0, target)  # a diverged head predicts class 0, which most images have
    half = pooled(features[:200], target[:200])
    candidates = [Candidate(LinearHead, HeadOptions(1e-3, 0.0)), Candidate(LinearHead, HeadOptions(1e30, 1e30))]
    result = run_search(half, pooled(features[200:], target[200:]), 2, candidates=candidates)
    assert result.chosen == 0
    assert result.accuracy[1] == 0


def test_head_does_not_depend_on_the_other_candidates() -> None:
    features, target = overlapping_clouds(2, count=300)
    half, rest = (
        pooled(features[:200], target[:200]),
        pooled(features[200:], target[200:]),
    )
    dropping = [Candidate(partial(MLPHead, hidden=(8,), dropout=0.5), HeadOptions(lr, 0.0)) for lr in (1e-2, 3e-3)]
    among = run_search(half, rest, 2, candidates=dropping)
    alone = run_search(half, rest, 2, candidates=dropping[1:])
    assert among.loss[1] == alone.loss[0]


@pytest.mark.parametrize("folds", [0, 3])
def test_equal_searches_give_equal_bits(folds: int) -> None:
    features, target = overlapping_clouds(3, count=300)
    train = pooled(features[:200], target[:200])
    val = pooled(features[200:], target[200:])
    candidates = [*GRID, Candidate(partial(MLPHead, hidden=(8,), dropout=0.5), HeadOptions(1e-2, 0.0))]
    first, second = (run_search(train, val, 3, candidates=candidates, folds=folds) for _ in range(2))
    assert torch.equal(first.accuracy, second.accuracy)
    assert torch.equal(first.loss, second.loss)
    assert (first.chosen, first.interval) == (second.chosen, second.interval)
    for name, tensor in first.head.state_dict().items():
        assert torch.equal(tensor, second.head.state_dict()[name])


TRIALS = 200


@pytest.mark.timeout(1200)
def test_intervals_cover_chance_on_random_labels() -> None:
    """In 200 searches on random labels, the intervals contain an accuracy of 0.5 as often as their level says."""
    covered = tested = 0
    for trial in range(TRIALS):
        generator = torch.Generator().manual_seed(trial)
        features = torch.randn(360, 8, generator=generator)
        target = torch.randint(0, 2, (360,), generator=generator)
        train, val = (
            pooled(features[:100], target[:100]),
            pooled(features[100:200], target[100:200]),
        )
        result = run_search(train, val, 2, seed=trial, epochs=1)
        covered += result.interval.low <= 0.5 <= result.interval.high
        # The winner on images that had no influence on the choice.
        guesses = result.head(features[200:]).argmax(1)
        accuracy = wilson_interval(int((guesses == target[200:]).sum()), 160)
        tested += accuracy.low <= 0.5 <= accuracy.high
    assert covered / TRIALS >= 0.95 - 0.047  # three standard errors of 200 trials
    assert tested / TRIALS >= 0.95 - 0.047


def test_search_without_candidates_is_refused() -> None:
    features, target = overlapping_clouds(2)
    with pytest.raises(ValueError, match="nothing to compare"):
        run_search(pooled(features, target), pooled(features, target), 2, candidates=[])


def test_single_validation_image_is_refused() -> None:
    features, target = overlapping_clouds(2)
    train, one = pooled(features, target), pooled(features[:1], target[:1])
    with pytest.raises(ValueError, match="1 validation images to choose by"):
        run_search(train, one, 2)
