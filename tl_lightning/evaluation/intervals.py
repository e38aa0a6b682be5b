"""Compute confidence intervals of accuracies."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from tl_lightning.evaluation.selection import choose_candidates, standard_errors

_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 100


class Interval(NamedTuple):
    """A score with its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: float, trials: int, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's confidence interval, such as the accuracy on the test images.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.

    Args:
        successes: Number of successful trials; an estimate of it may be a fraction.
        trials: Number of trials, at least one.
        level: Confidence level.

    Raises:
        ValueError: There are no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(
            f"{successes} of {trials} succeeded; there must be at least one trial, and no more successes than trials"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    estimate = successes / trials
    centre = (estimate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(estimate * (1 - estimate) / trials + z * z / (4 * trials**2))
    return Interval(estimate, max(0.0, centre - half), min(1.0, centre + half))


def bias_corrected_best(
    outcomes: Tensor, simplicity: Sequence[int] | None = None, level: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the accuracy of a candidate that was chosen by its accuracy on the same images.

    The best of many candidates looks better than it is. So the choice is repeated on resamples of the images, and each
    chosen candidate is scored on the images outside its resample (Tsamardinos et al. 2018, section 3.2,
    https://doi.org/10.1007/s10994-018-5714-4). The interval around the mean of these scores is Wilson's.

    Args:
        outcomes: Whether each candidate was correct on each image (candidates, images); at least two images.
        simplicity: Rank of each candidate, 0 for the simplest, if
            :func:`simplest_within_one_standard_error` chose it; None if the best was chosen.
        level: Confidence level.
        seed: Seed of the resamples.

    Returns:
        The accuracy without the optimism of the selection, and its interval.
    """
    values = outcomes.to(torch.float64)
    candidates, images = values.shape
    if candidates == 1:
        return wilson_interval(float(values.sum()), images, level)
    errors = standard_errors(values)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(0, _RESAMPLES, _RESAMPLES_AT_ONCE):
        drawn = torch.randint(images, (_RESAMPLES_AT_ONCE, images), generator=generator)
        counts = torch.zeros(_RESAMPLES_AT_ONCE, images, dtype=values.dtype)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=values.dtype))
        chosen = choose_candidates(values @ counts.T / images, errors, simplicity)
        outside = (counts == 0).to(values.dtype)
        correct = (values @ outside.T).gather(0, chosen[None])[0]
        usable = outside.any(1)  # a resample may hold all images
        scores.append(correct[usable] / outside.sum(1)[usable])
    return wilson_interval(float(torch.cat(scores).mean()) * images, images, level)
