from statistics import NormalDist

import pytest
import torch

from tl_lightning.evaluation import bias_corrected_best, wilson_interval

TRIALS = 400


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((15 / 148, 0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((1 / 29, 0.0061, 0.1718), abs=5e-5)
    with pytest.raises(ValueError, match="3 of 2 succeeded"):
        wilson_interval(3, 2)


def guesses(p: float, images: int, alike: float, generator: torch.Generator, *, candidates: int = 20) -> torch.Tensor:
    """Candidates that are right with probability p, more or less on the same images."""
    common, own = torch.randn(1, images, generator=generator), torch.randn(candidates, images, generator=generator)
    latent: torch.Tensor = alike**0.5 * common + (1 - alike) ** 0.5 * own
    return latent < NormalDist().inv_cdf(p)


@pytest.mark.parametrize(
    ("p", "images", "alike", "candidates"),
    [
        (0.5, 200, 0, 1),
        (0.5, 200, 0, 50),
        (0.5, 100, 0.9, 20),
        (0.9, 30, 0.5, 20),
        (0.97, 100, 0.95, 20),
        (0.9, 10, 0.9, 20),
    ],
)
@pytest.mark.parametrize("simplest", [False, True])
def test_interval_of_the_best_covers_the_truth_at_its_level(
    p: float, images: int, alike: float, candidates: int, simplest: bool
) -> None:
    """All candidates are equally good, so the luckiest is chosen."""
    generator = torch.Generator().manual_seed(0)
    covered = uncorrected = 0
    simplicity = list(range(candidates)) if simplest else None
    for trial in range(TRIALS):
        outcomes = guesses(p, images, alike, generator, candidates=candidates)
        found = bias_corrected_best(outcomes, simplicity, seed=trial)
        assert 0 <= found.low <= found.estimate <= found.high <= 1
        assert found.low < found.high
        covered += found.low <= p <= found.high
        naive = wilson_interval(int(outcomes.sum(1).max()), images)
        uncorrected += naive.low <= p <= naive.high
    # 0.95 within three standard errors of the number of trials
    assert covered / TRIALS >= 0.95 - 0.033
    if (candidates, alike) == (50, 0):
        assert uncorrected / TRIALS < 0.5


@pytest.mark.parametrize("simplest", [False, True])
def test_score_of_a_clear_winner_is_not_corrected(simplest: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    simplicity = list(range(20)) if simplest else None
    covered, estimates = 0, []
    for trial in range(TRIALS):
        outcomes = guesses(0.6, 100, 0, generator)
        outcomes[7] = guesses(0.9, 100, 0, generator, candidates=1)[0]
        found = bias_corrected_best(outcomes, simplicity, seed=trial)
        covered += found.low <= 0.9 <= found.high
        estimates.append(found.estimate)
    assert covered / TRIALS >= 0.95 - 0.033
    assert sum(estimates) / TRIALS == pytest.approx(0.9, abs=0.01)


def test_interval_of_a_perfect_score_on_few_images_is_wide() -> None:
    found = bias_corrected_best(torch.ones(20, 4, dtype=torch.bool), list(range(20)))
    assert found == wilson_interval(4, 4)
    assert found.low < 0.6


def test_single_candidate_has_the_wilson_interval() -> None:
    assert bias_corrected_best((torch.arange(400) < 300)[None]) == wilson_interval(300, 400)
