"""Fit scikit-learn's logistic regression, and choose its C by cross-validation."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

INVERSE_PENALTIES: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 9))
"""Values of C that cross-validation compares: from 0.00001, the strongest penalty, to 10,000."""

_FOLD_TOLERANCE = 1e-4  # enough to rank values of C
_FOLD_STEPS = 1000
_PATIENCE = 2  # values of C in a row that are worse than the best, after which the comparison ends

_Array = npt.NDArray[Any]


class Solution(NamedTuple):
    """A logistic regression with K classes over D features."""

    weight: Tensor
    """(K, D)."""
    bias: Tensor
    """(K,)."""
    converged: bool
    steps: int
    """Number of L-BFGS steps."""


def check_finite(features: Tensor) -> None:
    """Make sure that all features (N, D) are finite.

    Raises:
        ValueError: Some are not.
    """
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise ValueError(
            f"{bad:,} of {len(features):,} training images have features that are not finite, so no head "
            "can be solved for: check the backbone's weights and these images, or compute the features with precision "
            "32-true and dtype float32"
        )


def solve(features: Tensor, target: Tensor, C: float, *, tolerance: float, max_steps: int) -> Solution:
    """Minimise the mean cross-entropy plus ``|weight|^2 / (2 C N)``; the bias is not penalised.

    The objective: https://scikit-learn.org/stable/modules/linear_model.html#logistic-regression. It is solved in double
    precision: in single precision, rounding can end L-BFGS while gradient entries are still near 1e-5.

    Args:
        features: (N, D), on any device.
        target: Class numbers (N,), int64; each class occurs.
        C: Inverse strength of the penalty.
        tolerance: Largest entry of the gradient at which the solution counts as converged.
        max_steps: Largest number of L-BFGS steps.

    Returns:
        The solution, on the CPU. Two classes get half of scikit-learn's one direction each, with opposite signs.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from threadpoolctl import threadpool_limits  # scikit-learn requires it

    model = LogisticRegression(C=C, tol=tolerance, max_iter=max_steps)
    # One thread: the number of cores then cannot change the bits. It is also the fast choice where several processes
    # share the cores, because OpenBLAS threads spin while they wait for each other.
    with threadpool_limits(1, user_api="blas"):
        converged = _fit(model, features.cpu().double().numpy(), target.cpu().numpy())
    weight, bias = _weights(model)
    return Solution(torch.from_numpy(weight), torch.from_numpy(bias), converged, int(model.n_iter_.max()))


def choose_inverse_penalty(features: Tensor, target: Tensor, *, folds: int, seed: int) -> float:
    """Choose C by the mean cross-entropy of left-out images in stratified folds.

    C rises from the strongest penalty, until two values in a row are worse than the best. Each solution starts from the
    previous one.

    Args:
        features: (N, D), standardised, on any device.
        target: Class numbers (N,), int64; each class occurs.
        folds: Number of folds.
        seed: Seed of the assignment to folds.

    Raises:
        ValueError: Some class has fewer images than there are folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits

    smallest = int(torch.bincount(target).min())
    if smallest < folds:
        raise ValueError(
            f"the smallest class has {smallest} training images, too few for {folds} folds of cross-validation: give "
            "C, or fewer folds"
        )
    rows, labels = features.cpu().numpy(), target.cpu().numpy()
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32).split(rows, labels))
    models = [LogisticRegression(tol=_FOLD_TOLERANCE, max_iter=_FOLD_STEPS, warm_start=True) for _ in splits]
    losses: list[float] = []
    with threadpool_limits(1, user_api="blas"):
        for C in INVERSE_PENALTIES:
            fold_losses = []
            for model, (inside, outside) in zip(models, splits, strict=True):
                _fit(model.set_params(C=C), rows[inside], labels[inside])
                fold_losses.append(_cross_entropy(model, rows[outside], labels[outside]))
            losses.append(float(np.mean(fold_losses)))
            if len(losses) > _PATIENCE and min(losses[-_PATIENCE:]) > min(losses):
                break
    return INVERSE_PENALTIES[losses.index(min(losses))]


def _fit(model: Any, features: _Array, target: _Array) -> bool:
    """Fit a model; return whether it converged, instead of warning that it did not."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, target)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _weights(model: Any) -> tuple[_Array, _Array]:
    """Return weights (K, D) and biases (K,); scikit-learn has a single row for two classes."""
    weight, bias = model.coef_, model.intercept_
    if len(bias) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2


def _cross_entropy(model: Any, features: _Array, target: _Array) -> float:
    weight, bias = _weights(model)
    logits = torch.from_numpy(features @ weight.T + bias)  # (N, K)
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(target)))
