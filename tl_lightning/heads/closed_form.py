"""Heads that are fitted to all features at once, instead of being trained by gradient steps."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tl_lightning.heads._logistic_regression import check_finite, choose_inverse_penalty, solve
from tl_lightning.heads.neural import LinearHead
from tl_lightning.heads.standardize import Standardize

_MIN_SHARE = 1e-6  # of the votes, for a class without any


class ClosedFormHead(nn.Module, ABC):
    """Base of heads that are fitted to the features of all training images."""

    @abstractmethod
    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        """Fit the head.

        Args:
            features: Features (N, D).
            target: Class numbers (N,), int64.
            seed: Seed of all random numbers.

        Returns:
            A one-line summary of the solution.

        Raises:
            ValueError: The features or the classes do not allow a fit.
        """


class LogisticRegressionHead(LinearHead, ClosedFormHead):
    """Solve logistic regression with a squared penalty to convergence, by scikit-learn, on standardised features.

    Its parameters are those of :class:`LinearHead` with ``standardize``, so either loads the other's ``state_dict``.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        C: Inverse strength of the penalty, as in scikit-learn; None chooses it by cross-validation on the training
            images.
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
            features: Features (N, D), on any device.
            target: Class numbers (N,), int64.
            seed: Seed of the assignment to folds.

        Returns:
            C, how it was chosen, and whether the solver converged.

        Raises:
            ValueError: A feature is not finite, there is one class only, a class has no images, or it has fewer than
                folds.
        """
        check_finite(features)
        counts = _count_per_class(target, self.linear.out_features)
        if len(counts) < 2:
            raise ValueError("there is one class only; logistic regression needs images of at least two classes")
        standardized = _fit_standardize(self.standardize, features)
        C, how = self.C, "given"
        if C is None:
            C, how = choose_inverse_penalty(standardized, target, folds=self.folds, seed=seed), "by cross-validation"
        solution = solve(standardized, target, C, tolerance=self.tolerance, max_steps=self.max_steps)
        self.linear.weight.copy_(solution.weight)
        self.linear.bias.copy_(solution.bias)
        end = "converged" if solution.converged else "NOT converged: raise max_steps or lower C"
        return f"C = {C:.3g} {how}, {end} after {solution.steps} steps"


class ClassMeanHead(LinearHead, ClosedFormHead):
    """Choose the class with the nearest mean, on standardised features (https://doi.org/10.1109/TPAMI.2013.83).

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.

    Shape:
        Input: (N, D). Output: (N, K), minus half the squared distance to each class mean, divided by D, up to a term
        that is equal for all classes.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes, standardize=True)

    @torch.no_grad()
    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        """Compute the mean of each class.

        Args:
            features: Features (N, D).
            target: Class numbers (N,), int64.
            seed: Not used.

        Returns:
            The number of means.

        Raises:
            ValueError: Some class has no images, or some features are not finite.
        """
        check_finite(features)
        standardized = _fit_standardize(self.standardize, features)
        counts = _count_per_class(target, self.linear.out_features)
        means = torch.zeros_like(self.linear.weight).index_add_(0, target, standardized.to(self.linear.weight))
        means /= counts[:, None]
        scale = features.shape[1]  # so that logits do not grow with D
        self.linear.weight.copy_(means / scale)
        self.linear.bias.copy_(-means.square().sum(1) / (2 * scale))
        return f"{len(counts)} means"


class NearestNeighbourHead(ClosedFormHead):
    """Let the training images with the most similar features vote, with weights ``exp(cosine / temperature)``.

    DINO is evaluated in this way (https://arxiv.org/abs/2104.14294, section 4.1; Wu et al. 2018,
    https://arxiv.org/abs/1805.01978). The features of all training images become part of the checkpoint.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        neighbours: Number of images that vote.
        temperature: Temperature of the votes; a lower one gives the nearest images more weight.

    Raises:
        ValueError: ``neighbours`` or ``temperature`` is not above 0.

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
        """Store the normalised features.

        Args:
            features: Features (N, D).
            target: Class numbers (N,), int64.
            seed: Not used.

        Returns:
            The number of images, and how many of them vote.

        Raises:
            ValueError: Some features are not finite.
        """
        check_finite(features)
        self.bank = nn.functional.normalize(features)
        self.labels = target.clone()
        return f"{len(features):,} images stored, and the {min(self.neighbours, len(features))} nearest vote"

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits."""
        if not len(self.bank):
            return features.new_zeros(len(features), self.num_classes)
        cosine = nn.functional.normalize(features).to(self.bank) @ self.bank.T  # (N, images)
        nearest, places = cosine.topk(min(self.neighbours, len(self.bank)))
        weight = (nearest / self.temperature).softmax(1)
        votes = weight.new_zeros(len(features), self.num_classes).scatter_add_(1, self.labels[places], weight)
        return votes.clamp_min(_MIN_SHARE).log()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Resize the buffers to the number of saved images, then load them."""
        for name in ("bank", "labels"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                buffer = getattr(self, name)
                setattr(self, name, buffer.new_zeros(len(saved), *buffer.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _fit_standardize(module: nn.Module, features: Tensor) -> Tensor:
    assert isinstance(module, Standardize)  # noqa: S101 - built with standardize=True
    module.fit(features)
    standardized: Tensor = module.eval()(features)
    return standardized


def _count_per_class(target: Tensor, num_classes: int) -> Tensor:
    counts = torch.bincount(target, minlength=num_classes)
    empty = [number for number, count in enumerate(counts.tolist()) if not count]
    if empty:
        raise ValueError(
            f"there are no training images of the classes {empty}, counted from 0: add some, or leave the classes out"
        )
    return counts
