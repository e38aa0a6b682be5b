"""Against scikit-learn, whose objective it is."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tl_lightning.heads.logistic import solve
from tl_lightning.heads.penalty import PENALTIES, choose_penalty, stratified_folds


def samples(classes: int, count: int = 400, features: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping clouds, of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes * 2, (count,), generator=generator).clamp_max(classes - 1)
    centres = torch.randn(classes, features, generator=generator)
    return centres[target] * 0.4 + torch.randn(count, features, generator=generator), target


def objective(features: Tensor, target: Tensor, weight: Tensor, bias: Tensor, penalised: Tensor, c: float) -> float:
    loss = torch.nn.functional.cross_entropy(features.double() @ weight.double().T + bias.double(), target)
    return float(loss + penalised.double().square().sum() / (2 * c * len(features)))


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_scikit_learn(classes: int, c: float, dtype: torch.dtype) -> None:
    features, target = samples(classes)
    features = features.to(dtype)
    unseen, _ = samples(classes, count=2000, seed=1)
    theirs = LogisticRegression(C=c, tol=1e-6, max_iter=5000).fit(features.numpy(), target.numpy())
    ours = solve(features, target, classes, torch.tensor([c]), tolerance=1e-6, max_steps=5000)
    assert bool(ours.converged[0])
    scores = unseen.to(dtype) @ ours.weight[0].T + ours.bias[0]
    assert (scores.argmax(1).numpy() == theirs.predict(unseen.to(dtype).numpy())).mean() >= 0.995
    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    if classes == 2:
        here = objective(features, target, ours.weight[0], ours.bias[0], ours.weight[0, 1] - ours.weight[0, 0], c)
        there = objective(features, target, torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2, weight, c)
    else:
        here = objective(features, target, ours.weight[0], ours.bias[0], ours.weight[0], c)
        there = objective(features, target, weight, bias, weight, c)
    assert here == pytest.approx(there, abs=1e-6)
    assert float(ours.loss[0]) == pytest.approx(here, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_many_problems_are_the_single_ones(classes: int) -> None:
    features, target = samples(classes)
    features = features.double()
    cs = torch.tensor([0.01, 0.1, 1.0, 10.0])
    weights = torch.rand(4, len(features), generator=torch.Generator().manual_seed(0)).round().double()
    together = solve(features, target, classes, cs, weights, tolerance=1e-9, max_steps=5000)
    assert bool(together.converged.all())
    for number in range(4):
        kept = weights[number] > 0
        alone = solve(features[kept], target[kept], classes, cs[number : number + 1], tolerance=1e-9, max_steps=5000)
        torch.testing.assert_close(together.weight[number], alone.weight[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.bias[number], alone.bias[0], rtol=0, atol=1e-5)


def test_goes_on_from_a_solution() -> None:
    features, target = samples(3)
    cold = solve(features, target, 3, torch.tensor([1.0]))
    warm = solve(features, target, 3, torch.tensor([1.0]), start=cold)
    assert warm.steps == 0
    assert torch.equal(warm.weight, cold.weight)
    near = solve(features, target, 3, torch.tensor([0.9]), start=cold)
    assert near.steps < cold.steps
    assert not solve(features, target, 3, torch.tensor([1.0]), max_steps=2).converged[0]


def test_separable_classes_end() -> None:
    """Without a penalty the weights would grow for ever."""
    features, target = samples(2, features=600)
    found = solve(features, target, 2, torch.tensor([1e4]), tolerance=1e-5, max_steps=3000)
    assert bool(found.converged[0])
    assert ((features @ found.weight[0].T + found.bias[0]).argmax(1) == target).all()


def test_penalty_is_that_of_the_least_loss_left_out() -> None:
    features, target = samples(3)
    chosen = choose_penalty(features, target, 3, folds=5, seed=1)
    fold = stratified_folds(target, 5, seed=1).numpy()
    losses = []
    for c in PENALTIES:
        held_out = []
        for number in range(5):
            inside, outside = fold != number, fold == number
            model = LogisticRegression(C=c, tol=1e-5, max_iter=5000).fit(
                features[inside].numpy(), target[inside].numpy()
            )
            likely = np.log(model.predict_proba(features[outside].numpy()).clip(1e-30))
            held_out.append(-likely[np.arange(outside.sum()), target[outside].numpy()].mean())
        losses.append(np.mean(held_out))
    assert chosen == PENALTIES[int(np.argmin(losses))]
    assert PENALTIES[0] < chosen < PENALTIES[-1]


def test_folds_are_stratified() -> None:
    target = torch.tensor([0] * 13 + [1] * 7 + [2] * 5)
    fold = stratified_folds(target, 5, seed=0)
    for label in range(3):
        counts = torch.bincount(fold[target == label], minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(torch.bincount(fold), torch.full((5,), 5))
    assert not torch.equal(fold, stratified_folds(target, 5, seed=1))


def test_wrong_input_is_named() -> None:
    features, target = samples(2)
    with pytest.raises(ValueError, match=r"C is \[0\.0\]; it must be above 0"):
        solve(features, target, 2, torch.tensor([0.0]))
    features[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        solve(features, target, 2, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="the smallest class has 3 training images, too few for 5 folds"):
        choose_penalty(torch.zeros(10, 2), torch.tensor([0] * 7 + [1] * 3), 2, folds=5, seed=0)
