"""Choose one candidate of many by its scores on held-out images."""

from collections.abc import Sequence

import torch
from torch import Tensor


def simplest_within_one_standard_error(outcomes: Tensor, simplicity: Sequence[int]) -> int:
    """Choose the simplest candidate whose score is within one standard error of the best.

    A smaller difference may be chance (Breiman et al. 1984, section 3.4.3; Hastie et al. 2009,
    https://hastie.su.domains/ElemStatLearn, section 7.10).

    Args:
        outcomes: Score of each candidate on each image that it was not trained on (candidates, images).
        simplicity: Rank of each candidate, 0 for the simplest.

    Returns:
        The number of the candidate.

    Raises:
        ValueError: There are fewer than two images, so that the standard error is undefined.
    """
    if outcomes.shape[1] < 2:
        raise ValueError(f"there is {outcomes.shape[1]} image to choose by; there must be at least 2")
    values = outcomes.to(torch.float64)
    return int(choose_candidates(values.mean(1)[:, None], standard_errors(values), simplicity))


def standard_errors(outcomes: Tensor) -> Tensor:
    """Return the standard error of each candidate's mean (candidates,) from outcomes (candidates, images)."""
    return outcomes.std(1, correction=1).div(outcomes.shape[1] ** 0.5)


def choose_candidates(scores: Tensor, errors: Tensor, simplicity: Sequence[int] | None) -> Tensor:
    """Choose one candidate for each column of scores.

    Args:
        scores: Scores (candidates, columns).
        errors: Standard error of each candidate's score (candidates,).
        simplicity: Rank of each candidate, 0 for the simplest; None chooses the best.

    Returns:
        Numbers of the candidates (columns,).
    """
    best, winners = scores.max(0)
    if simplicity is None:
        return winners
    ranks = torch.tensor(simplicity)[:, None].expand_as(scores)
    eligible = scores >= best - errors[winners]
    return torch.where(eligible, ranks, len(scores)).argmin(0)
