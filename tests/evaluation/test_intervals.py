import pytest
import torch

from tl_lightning.evaluation import best_of_many, share

TRIALS = 400


def test_share_is_wilsons() -> None:
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
    assert share(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert share(15, 148) == pytest.approx((15 / 148, 0.0624, 0.1605), abs=5e-5)
    assert share(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=5e-5)
    assert share(1, 29) == pytest.approx((1 / 29, 0.0061, 0.1718), abs=5e-5)
    with pytest.raises(ValueError, match="3 of 2 succeeded"):
        share(3, 2)


@pytest.mark.parametrize("candidates", [1, 50])
def test_best_of_many_covers_chance_at_its_level(candidates: int) -> None:
    """Candidates that only guess, of which the luckiest is reported."""
    generator = torch.Generator().manual_seed(0)
    covered = uncorrected = 0
    for trial in range(TRIALS):
        outcomes = torch.rand(candidates, 200, generator=generator) < 0.5
        chosen = int(outcomes.double().mean(1).argmax())
        found = best_of_many(outcomes, chosen, seed=trial)
        covered += found.low <= 0.5 <= found.high
        naive = share(int(outcomes[chosen].sum()), 200)
        uncorrected += naive.low <= 0.5 <= naive.high
    # 0.95 within three standard errors of the number of trials
    assert 0.95 - 0.033 <= covered / TRIALS <= 1
    assert candidates == 1 or uncorrected / TRIALS < 0.5


def test_one_candidate_has_the_usual_interval() -> None:
    outcomes = (torch.arange(400) < 300)[None]
    found, usual = best_of_many(outcomes, 0), share(300, 400)
    assert found.estimate == pytest.approx(0.75, abs=0.005)
    assert (found.low, found.high) == pytest.approx((usual.low, usual.high), abs=0.006)
