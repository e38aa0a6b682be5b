"""Logistic regression to convergence: many problems over the same samples at once, on any device."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_HISTORY = (10, 40)  # steps that are remembered: more take fewer steps, and more memory
_HISTORY_NUMBERS = 2**25
_HALVINGS = 30
_CURVED = 1e-10  # curvature along a step, over the squared change of the gradient, below which it is rounding

Array = npt.NDArray[np.float64]


class Solution(NamedTuple):
    """Of B problems with K classes over D features."""

    weight: Tensor
    """(B, K, D)."""
    bias: Tensor
    """(B, K)."""
    loss: Tensor
    """The objective (B,): mean loss with the penalty."""
    converged: Tensor
    """Whether the gradient's largest entry fell below the tolerance (B,), bool."""
    steps: int


def solve(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    inverse_penalty: Tensor,
    sample_weight: Tensor | None = None,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    start: Solution | None = None,
) -> Solution:
    """Minimise the weighted mean of the cross-entropy plus ``|weight|^2 / (2 C N)``, for several C and sample weights.

    The objective is that of scikit-learn's ``LogisticRegression`` with the same C: the bias is not penalised, and two classes
    have one direction, of which each class gets half with its own sign. Minimised by L-BFGS (Liu and Nocedal 1989,
    https://doi.org/10.1007/BF01589116), all problems together in products of matrices, with the
    direction in its compact form (Byrd, Nocedal and Schnabel 1994, https://doi.org/10.1007/BF01582063).

    Args:
        features: (N, D), in single or double precision.
        target: Class numbers (N,), int64.
        num_classes: Number K of classes.
        inverse_penalty: C of each problem (B,).
        sample_weight: Weights (B, N); None weighs all samples alike.
        tolerance: Of the gradient's largest entry.
        max_steps: After so many steps, a problem counts as not converged.
        start: Where to begin, for as many problems; None begins at zero.

    Raises:
        ValueError: A feature is not finite, or C is not above 0.
    """
    if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():  # the sum alone is far faster
        raise ValueError(
            "some features are not finite, so no logistic regression fits them; look at the weights and images"
        )
    if not bool((inverse_penalty > 0).all()):
        raise ValueError(f"C is {inverse_penalty.tolist()}; it must be above 0")
    problem = _Problem(features, target, num_classes, inverse_penalty, sample_weight)
    point = problem.start(start)
    value, gradient = problem(point)
    history = _History(point)
    active = abs(gradient).max(1) > tolerance
    steps = 0
    while active.any() and steps < max_steps:
        direction = history.direction(gradient)
        slope = (gradient * direction).sum(1)
        length = active.astype(float)
        if steps == 0:
            length *= np.minimum(1, 1 / np.maximum(abs(gradient).sum(1), 1e-30))
        slack = 10 * torch.finfo(features.dtype).eps * abs(value)  # what rounding does to the value
        for _ in range(_HALVINGS):
            there = point + length[:, None] * direction
            value_there, gradient_there = problem(there)
            failed = active & ~(value_there <= value + 1e-4 * length * slope + slack)
            if not failed.any():
                break
            length[failed] /= 2
        active &= ~failed  # no further down, by rounding
        history.add(there - point, gradient_there - gradient)
        point, value, gradient = there, value_there, gradient_there
        active &= abs(gradient).max(1) > tolerance
        steps += 1
    weight, bias = problem.per_class(point)
    return Solution(weight, bias, torch.from_numpy(value), torch.from_numpy(abs(gradient).max(1) <= tolerance), steps)


class _Problem:
    """The objectives and their gradients: products of matrices on the device, between points on the host."""

    def __init__(
        self, features: Tensor, target: Tensor, num_classes: int, inverse_penalty: Tensor, sample_weight: Tensor | None
    ) -> None:
        self.features = features
        self.outputs = 1 if num_classes == 2 else num_classes
        self.problems = len(inverse_penalty)
        if sample_weight is None:
            sample_weight = features.new_ones(1, len(features)).expand(self.problems, -1)
        total = sample_weight.double().sum(1)
        self.share = (sample_weight / total[:, None]).to(features).T.contiguous()  # (N, B)
        self.penalty = (1 / (inverse_penalty.double().to(total.device) * total)).cpu().numpy()[:, None, None]
        if num_classes == 2:
            self.sign = (2 * target - 1).to(features)[:, None]  # (N, 1)
            self.minus_share = -self.sign * self.share
            self.negative = -self.share
        else:
            self.one_hot = torch.nn.functional.one_hot(target, num_classes).to(features)[:, None]  # (N, 1, K)

    def start(self, solution: Solution | None) -> Array:
        if solution is None:
            return np.zeros((self.problems, self.outputs * (self.features.shape[1] + 1)))
        both = torch.cat([solution.weight, solution.bias[..., None]], 2)  # (B, K, D + 1)
        if self.outputs == 1:
            both = both[:, 1:] - both[:, :1]
        return both.flatten(1).double().cpu().numpy()

    def __call__(self, point: Array) -> tuple[Array, Array]:
        """Return the values (B,) and gradients (B, P) at points (B, P)."""
        both = point.reshape(self.problems, self.outputs, -1)
        weight, bias = self._parts(point)
        scores = self._times(weight.flatten(0, 1).T).add_(bias.flatten())  # (N, B * outputs)
        if self.outputs == 1:
            margin = scores.mul_(self.sign)
            value = (torch.nn.functional.logsigmoid(margin) * self.negative).sum(0)
            residual = margin.neg_().sigmoid_().mul_(self.minus_share)  # by the probability of the other class
        else:
            scores = scores.view(len(scores), self.problems, self.outputs)
            log_sum = scores.logsumexp(2)
            value = (self.share * (log_sum - (scores * self.one_hot).sum(2))).sum(0)
            residual = ((scores - log_sum[..., None]).exp() - self.one_hot).mul_(self.share[..., None]).flatten(1)
        down = np.empty_like(both)
        down[..., :-1] = _to_host(self._back(residual)).reshape(weight.shape)
        down[..., -1] = _to_host(residual.sum(0)).reshape(bias.shape)
        shrunk = self.penalty * both[..., :-1]
        down[..., :-1] += shrunk
        return _to_host(value) + (both[..., :-1] * shrunk).sum((1, 2)) / 2, down.reshape(self.problems, -1)

    # numpy's products with a vector take half the time of torch's on a CPU.

    def _times(self, weight: Tensor) -> Tensor:
        if self.features.device.type == "cpu":
            return torch.from_numpy(self.features.numpy() @ weight.numpy())
        return self.features @ weight

    def _back(self, residual: Tensor) -> Tensor:
        if self.features.device.type == "cpu":
            return torch.from_numpy(residual.numpy().T @ self.features.numpy())
        return residual.T @ self.features

    def _parts(self, point: Array) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(point).view(self.problems, self.outputs, -1).to(self.features)
        return both[..., :-1].contiguous(), both[..., -1]

    def per_class(self, point: Array) -> tuple[Tensor, Tensor]:
        """Return weights (B, K, D) and biases (B, K)."""
        weight, bias = self._parts(point)
        if self.outputs == 1:
            return torch.cat([-weight, weight], 1) / 2, torch.cat([-bias, bias], 1) / 2
        return weight, bias


def _to_host(found: Tensor) -> Array:
    host: Array = found.double().cpu().numpy()
    return host


class _History:
    """The last steps and what they did to the gradient, for a direction that knows the curvature."""

    def __init__(self, point: Array) -> None:
        problems, size = point.shape
        self.length = min(max(_HISTORY_NUMBERS // (2 * point.size), _HISTORY[0]), _HISTORY[1])
        self.vectors = np.zeros((problems, 2 * self.length + 1, size))  # steps, changes, gradient
        self.inner = np.zeros((problems, 2 * self.length + 1, 2 * self.length + 1))  # products of each with each
        self.slots: list[int] = []  # oldest first

    def add(self, step: Array, change: Array) -> None:
        slot = len(self.slots) if len(self.slots) < self.length else self.slots.pop(0)
        self.slots.append(slot)
        self._put([slot, self.length + slot], np.stack([step, change], 1))

    def _put(self, places: list[int], vectors: Array) -> None:
        self.vectors[:, places] = vectors
        products = self.vectors @ vectors.transpose(0, 2, 1)
        self.inner[:, places] = products.transpose(0, 2, 1)
        self.inner[:, :, places] = products

    def direction(self, gradient: Array) -> Array:
        """Return the way down (B, P)."""
        self._put([-1], gradient[:, None])
        inner = self.inner
        step = np.array(self.slots, dtype=np.intp)
        change = step + self.length
        mix = np.zeros(inner.shape[:2])  # of the vectors, in the direction
        mix[:, -1] = -1
        if len(step):
            curvature, size = inner[:, step, change], inner[:, change, change]
            sound = curvature > _CURVED * size  # else the step was none, or the curvature is rounding
            both = sound[:, :, None] & sound[:, None]
            diagonal = np.eye(len(step)) * np.where(sound, curvature, 1)[:, None]
            upper = np.triu(np.where(both, inner[:, step[:, None], change], 0), 1) + diagonal
            scale = np.where(sound[:, -1], curvature[:, -1] / np.where(sound[:, -1], size[:, -1], 1), 1)[:, None]
            along_steps = np.where(sound, inner[:, step, -1], 0)[..., None]
            along_changes = np.where(sound, inner[:, change, -1], 0)[..., None]
            changes = np.where(both, inner[:, change[:, None], change], 0)
            weight = np.linalg.solve(upper, along_steps)
            inside = (diagonal + scale[..., None] * changes) @ weight - scale[..., None] * along_changes
            mix[:, step] = -np.linalg.solve(upper.transpose(0, 2, 1), inside)[..., 0]
            mix[:, change] = scale * weight[..., 0]
            mix[:, -1:] = -scale
        found: Array = (mix[:, None] @ self.vectors)[:, 0]
        return found
