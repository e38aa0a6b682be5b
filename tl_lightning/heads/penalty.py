"""Choose the penalty of a logistic regression."""

import torch
from torch import Tensor

from tl_lightning.heads.logistic import Solution, solve

PENALTIES: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 9))
"""C among which cross-validation chooses: from 0.00001 to 10,000."""


def choose_penalty(features: Tensor, target: Tensor, num_classes: int, *, folds: int, seed: int) -> float:
    """Choose C by the mean cross-entropy of images left out, in stratified folds.

    C is raised from a strong penalty on, each solution being the start of the next, until it gets worse twice.

    Args:
        features: (N, D), standardised.
        target: Class numbers (N,), int64.
        num_classes: Number K of classes.
        folds: How often another part is left out.
        seed: Of the division.

    Raises:
        ValueError: Some class has fewer images than there are folds.
    """
    smallest = int(torch.bincount(target, minlength=num_classes).min())
    if smallest < folds:
        raise ValueError(
            f"the smallest class has {smallest} training images, too few for {folds} folds of cross-validation: give C, or "
            "fewer folds"
        )
    fold = stratified_folds(target, folds, seed)
    left_out = (fold == torch.arange(folds, device=fold.device)[:, None]).to(features.dtype)  # (folds, N)
    losses: list[float] = []
    found: Solution | None = None
    for C in PENALTIES:
        each = features.new_full((folds,), C)
        found = solve(features, target, num_classes, each, 1 - left_out, tolerance=1e-4, start=found)
        losses.append(float(_losses(found, features, target, left_out).mean()))
        if len(losses) > 2 and min(losses[-2:]) > min(losses):
            break
    return PENALTIES[losses.index(min(losses))]


def _losses(found: Solution, features: Tensor, target: Tensor, sample_weight: Tensor) -> Tensor:
    scores = torch.einsum("nd,bkd->bnk", features, found.weight) + found.bias[:, None]
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), target.repeat(len(scores)), reduction="none").view(
        len(scores), -1
    )
    means: Tensor = (loss * sample_weight).sum(1) / sample_weight.sum(1)
    return means


def stratified_folds(target: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each sample (N,), of every class equally many in each, as far as they go."""
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(target), dtype=torch.int64)
    labels = target.cpu()
    begin = 0
    for number in torch.unique(labels).tolist():
        members = (labels == number).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        fold[members] = (torch.arange(len(members)) + begin) % folds
        begin += len(members)  # so that what does not divide goes to other folds in the next class
    return fold.to(target.device)
