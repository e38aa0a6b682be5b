"""Heads that are solved for on all features at once, instead of being trained step by step."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tl_lightning.heads._logistic_regression import choose_inverse_penalty, solve
from tl_lightning.heads.neural import LinearHead, Standardize
from tl_lightning.utils.distributed import broadcast_object


class ClosedFormHead(nn.Module, ABC):
    """A head that is fitted to the features of all training images."""

    @abstractmethod
    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        """Fit the head.

        Args:
            features: (N, D).
            target: Class numbers (N,), int64.
            seed: Of whatever is drawn.

        Returns:
            A few words on what was found.

        Raises:
            ValueError: The features or classes do not allow it.
        """


class LogisticRegressionHead(LinearHead, ClosedFormHead):
    """Solve logistic regression with a squared penalty to convergence, by scikit-learn, on standardised features.

    Its parameters are those of :class:`LinearHead` with ``standardize``, so either loads the other's ``state_dict``.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        C: Inverse strength of the penalty, as in scikit-learn; None chooses it by cross-validation on the training images.
        tolerance: Largest entry of the objective's gradient at which the solution counts as converged.
        max_steps: Number of L-BFGS steps after which the solver gives up.
        folds: Number of folds of the cross-validation.

    Raises:
        ValueError: ``C`` is not above 0, or there are fewer than two folds.

    Shape:
        Input: (N, D). Output: (N, K).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        C: float | None = None,
        tolerance: float = 1e-5,
        max_steps: int = 1000,
        folds: int = 5,
    ) -> None:
        if C is not None and not C > 0:
            raise ValueError(f"C is {C}; it is the inverse of the penalty's strength, and above 0")
        if folds < 2:
            raise ValueError(f"folds is {folds}; cross-validation needs at least 2")
        super().__init__(in_features, num_classes, standardize=True)
        self.C = C
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.folds = folds

    @torch.no_grad()
    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        """Choose C, if it is not given, and solve on the CPU.

        Args:
            features: (N, D), on any device.
            target: Class numbers (N,), int64.
            seed: Seed of the assignment to folds.

        Returns:
            C, how it was chosen, and whether the solver converged.

        Raises:
            ValueError: A feature is not finite, there is one class only, a class has no images, or it has fewer than folds.
        """
        _check_finite(features)
        counts = _counts(target, self.linear.out_features)
        if len(counts) < 2:
            raise ValueError("there is one class only; logistic regression needs images of at least two classes")
        standard = _standardise(self.standardize, features)
        C, how = self.C, "given"
        if C is None:
            C, how = choose_inverse_penalty(standard, target, folds=self.folds, seed=seed), "by cross-validation"
        solution = solve(standard, target, C, tolerance=self.tolerance, max_steps=self.max_steps)
        # All ranks solve, so that none waits until a collective operation times out. Rank 0's solution counts: other CPUs round
        # differently.
        C, solution = broadcast_object((C, solution))
        self.linear.weight.copy_(solution.weight)
        self.linear.bias.copy_(solution.bias)
        end = "converged" if solution.converged else "NOT converged: raise max_steps or lower C"
        return f"C = {C:.3g} {how}, {end} after {solution.steps} steps"


class ClassMeanHead(LinearHead, ClosedFormHead):
    """Take the class whose mean is nearest, on standardised features (https://doi.org/10.1109/TPAMI.2013.83).

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.

    Shape:
        Input: (N, D). Output: (N, K), minus half the squared distance to each mean over D, up to what all classes share.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes, standardize=True)

    @torch.no_grad()
    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        """Compute the means."""
        standard = _standardise(self.standardize, features)
        counts = _counts(target, self.linear.out_features)
        means = torch.zeros_like(self.linear.weight).index_add_(0, target, standard.to(self.linear.weight))
        means /= counts[:, None]
        scale = features.shape[1]  # else class scores would grow with D
        self.linear.weight.copy_(means / scale)
        self.linear.bias.copy_(-means.square().sum(1) / (2 * scale))
        return f"{len(counts)} means"


class NearestNeighbourHead(ClosedFormHead):
    """Let the most similar training images vote, by the cosine of their features, with weights ``exp(cosine / temperature)``.

    As in the evaluation of DINO (https://arxiv.org/abs/2104.14294, section 4.1; Wu et al. 2018,
    https://arxiv.org/abs/1805.01978). The features of all training images become part of the checkpoint.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        neighbours: Number of images that vote.
        temperature: Of the weights.

    Raises:
        ValueError: A number is not above 0.

    Shape:
        Input: (N, D). Output: (N, K), the logarithm of each class's share of the votes.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, in_features: int, num_classes: int, neighbours: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        if neighbours < 1 or not temperature > 0:
            raise ValueError(f"neighbours is {neighbours} and temperature {temperature}; both must be above 0")
        self.num_classes = num_classes
        self.neighbours = neighbours
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))  # never trained
        self.register_buffer("bank", torch.zeros(0, in_features))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        """Remember the features."""
        self.bank = nn.functional.normalize(features)
        self.labels = target.clone()
        return f"{len(features):,} images, of which {min(self.neighbours, len(features))} vote"

    def forward(self, features: Tensor) -> Tensor:
        """Compute class scores."""
        if not len(self.bank):
            return features.new_zeros(len(features), self.num_classes)
        cosine = nn.functional.normalize(features).to(self.bank) @ self.bank.T  # (N, images)
        best, which = cosine.topk(min(self.neighbours, len(self.bank)))
        weight = (best / self.temperature).softmax(1)
        votes = weight.new_zeros(len(features), self.num_classes).scatter_add_(1, self.labels[which], weight)
        return votes.clamp_min(_NO_VOTE).log()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for as many images as were saved."""
        for name in ("bank", "labels"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                here = getattr(self, name)
                setattr(self, name, here.new_zeros(len(saved), *here.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *args)


_NO_VOTE = 1e-6


def _standardise(module: nn.Module, features: Tensor) -> Tensor:
    assert isinstance(module, Standardize)  # noqa: S101 - the heads here are made with it
    module.fit(features)
    standard: Tensor = module.eval()(features)
    return standard


def _check_finite(features: Tensor) -> None:
    wrong = int((~features.isfinite().all(1)).sum())
    if wrong:
        raise ValueError(
            f"{wrong:,} of {len(features):,} training images have features that are not finite, so no logistic regression fits "
            "them: check the backbone's weights and these images, or compute the features with precision 32-true and dtype float32"
        )


def _counts(target: Tensor, num_classes: int) -> Tensor:
    counts = torch.bincount(target, minlength=num_classes)
    empty = [number for number, count in enumerate(counts.tolist()) if not count]
    if empty:
        raise ValueError(f"there are no training images of the classes {empty}, by their numbers")
    return counts
