"""Choose one candidate of many."""

from collections.abc import Sequence

import torch
from torch import Tensor


def simplest_within_one_standard_error(outcomes: Tensor, simplicity: Sequence[int]) -> int:
    """Choose the simplest candidate whose score is within one standard error of the best.

    What is better by less than chance gives is not better (Breiman et al. 1984, section 3.4.3; Hastie et al. 2009,
    https://hastie.su.domains/ElemStatLearn, section 7.10).

    Args:
        outcomes: (candidates, images): what each candidate has on each image that it was not trained on.
        simplicity: Place of each candidate among them, the simplest first.

    Returns:
        Its number.

    Raises:
        ValueError: There are fewer than two images, so that nobody knows what chance gives.
    """
    if outcomes.shape[1] < 2:
        raise ValueError(f"there is {outcomes.shape[1]} image to choose by; there must be at least 2")
    values = outcomes.to(torch.float64)
    return int(choose(values.mean(1)[:, None], standard_errors(values), simplicity))


def standard_errors(outcomes: Tensor) -> Tensor:
    """Return the standard error of each candidate's mean (candidates,)."""
    return outcomes.std(1, correction=1).div(outcomes.shape[1] ** 0.5)


def choose(scores: Tensor, errors: Tensor, simplicity: Sequence[int] | None) -> Tensor:
    """Choose in each column of scores.

    Args:
        scores: (candidates, columns).
        errors: Standard error of each candidate's score (candidates,).
        simplicity: Place of each candidate, the simplest first; None takes the best.

    Returns:
        Numbers of the candidates (columns,).
    """
    best, which = scores.max(0)
    if simplicity is None:
        return which
    places = torch.tensor(simplicity)[:, None].expand_as(scores)
    within = scores >= best - errors[which]
    return torch.where(within, places, len(scores)).argmin(0)
