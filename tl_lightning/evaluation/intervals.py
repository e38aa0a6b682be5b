"""How far a score may be from what it estimates."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from tl_lightning.evaluation.selection import choose, standard_errors

_RESAMPLES = 1000
_AT_ONCE = 100


class Interval(NamedTuple):
    """A score and where the true one lies."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: float, trials: int, level: float = 0.95) -> Interval:
    """Return a share and its interval, as of the accuracy on images that nothing was chosen by.

    Wilson's interval (1927, https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes: How many of the trials succeeded; an estimate of it may be no whole number.
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


def bias_corrected_best(
    outcomes: Tensor, simplicity: Sequence[int] | None = None, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the share that the chosen one of many candidates gets right, which was chosen by this very share.

    The best of many looks better than it is. So one is chosen in the same way on resamples of the images, and scored on the
    images that are not in the resample (Tsamardinos et al. 2018, section 3.2, https://doi.org/10.1007/s10994-018-5714-4).
    The interval around that is Wilson's.

    Args:
        outcomes: (candidates, images): whether each candidate was right on each image; at least two images.
        simplicity: Place of each candidate, the simplest first, where
            :func:`simplest_within_one_standard_error` has chosen; None where the best was taken.
        level: Of confidence.
        seed: Of the resamples.

    Returns:
        The share without what choosing added, and its interval.
    """
    values = outcomes.to(torch.float64)
    candidates, images = values.shape
    if candidates == 1:
        return wilson_interval(float(values.sum()), images, level)
    errors = standard_errors(values)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        drawn = torch.randint(images, (_AT_ONCE, images), generator=generator)
        counts = torch.zeros(_AT_ONCE, images, dtype=values.dtype)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=values.dtype))
        chosen = choose(values @ counts.T / images, errors, simplicity)
        outside = (counts == 0).to(values.dtype)
        right = (values @ outside.T).gather(0, chosen[None])[0]
        some = outside.any(1)
        found.append(right[some] / outside.sum(1)[some])
    return wilson_interval(float(torch.cat(found).mean()) * images, images, level)
