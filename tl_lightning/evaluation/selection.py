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
    """
    values = outcomes.to(torch.float64)
    scores = values.mean(1)
    best = int(scores.argmax())
    error = float(values[best].std(correction=1)) / values.shape[1] ** 0.5
    within = [number for number, score in enumerate(scores.tolist()) if score >= float(scores[best]) - error]
    return min(within, key=lambda number: simplicity[number])
