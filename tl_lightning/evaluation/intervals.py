"""How far a score may be from what it estimates."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from tl_lightning.evaluation.selection import choose

_RESAMPLES = 2000
_AT_ONCE = 100


class Interval(NamedTuple):
    """A score and where the true one lies."""

    estimate: float
    low: float
    high: float


def share(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Return a share and its interval, as of the accuracy on images that nothing was chosen by.

    Wilson's interval (1927, https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes: How many of the trials succeeded.
        trials: At least one.
        level: Of confidence.

    Raises:
        ValueError: There are no trials, or fewer than successes.
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(
            f"{successes} of {trials} succeeded; there must be at least one trial, and as many as successes"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    estimate = successes / trials
    middle = (estimate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(estimate * (1 - estimate) / trials + z * z / (4 * trials**2))
    return Interval(estimate, max(0.0, middle - half), min(1.0, middle + half))


def best_of_many(
    outcomes: Tensor, chosen: int, simplicity: Sequence[int] | None = None, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the score of a candidate that was chosen among many by this very score, and its interval.

    The best of many looks better than it is. By how much is read off resamples of the images, in each of which one is chosen
    in the same way, by what it gained over its own score (White 2000, https://doi.org/10.1111/1468-0262.00152). Where no
    candidate is truly better than another the interval has its level; where some are clearly worse it has more.

    Args:
        outcomes: (candidates, images): what each candidate has on each image, as whether it was right.
        chosen: Which candidate was chosen.
        simplicity: Place of each candidate, the simplest first, where
            :func:`simplest_within_one_standard_error` has chosen; None where the best was taken.
        level: Of confidence.
        seed: Of the resamples.

    Returns:
        The score without what choosing added, and its interval.
    """
    values = outcomes.to(torch.float64)
    scores = values.mean(1)  # (candidates,)
    errors = values.std(1, correction=1) / values.shape[1] ** 0.5
    generator = torch.Generator().manual_seed(seed)
    gains = []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        drawn = torch.randint(values.shape[1], (_AT_ONCE, values.shape[1]), generator=generator)
        counts = torch.zeros(_AT_ONCE, values.shape[1], dtype=values.dtype).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=values.dtype)
        )
        resampled = values @ counts.T / values.shape[1]  # (candidates, resamples)
        gained = resampled - scores[:, None]
        gains.append(gained.gather(0, choose(gained, errors, simplicity)[None])[0])
    gain = torch.cat(gains)
    score = float(scores[chosen])
    low, middle, high = (float(gain.quantile(q)) for q in ((1 + level) / 2, 0.5, (1 - level) / 2))
    return Interval(score - middle, max(0.0, score - low), score - high)
