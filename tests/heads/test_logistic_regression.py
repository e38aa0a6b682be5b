import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from tests.heads.clouds import overlapping_clouds
from tl_lightning.heads import LinearHead, LogisticRegressionHead
from tl_lightning.heads._logistic_regression import INVERSE_PENALTIES, choose_inverse_penalty, solve


def fit_head(features: Tensor, target: Tensor, classes: int, seed: int = 0, **options: float) -> LogisticRegressionHead:
    head = LogisticRegressionHead(features.shape[1], classes, **options)  # type: ignore[arg-type]  # numbers
    head.fit(features, target, seed)
    return head.eval()


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_probabilities_are_those_of_scikit_learn(classes: int, C: float, dtype: torch.dtype) -> None:
    features, target = overlapping_clouds(classes)
    scale = torch.linspace(1, 100, 30, dtype=dtype)
    features = features.to(dtype) * scale + 5
    head = fit_head(features, target, classes, C=C, tolerance=1e-8)
    scaler = StandardScaler().fit(features.double().numpy())
    model = LogisticRegression(C=C, tol=1e-8, max_iter=1000)
    with threadpool_limits(1):
        model.fit(scaler.transform(features.double().numpy()), target.numpy())
    weight = head.linear.weight.detach().numpy()
    if classes == 2:
        np.testing.assert_array_equal(weight[0], -weight[1])
        weight = weight[1:] - weight[:1]
    np.testing.assert_allclose(weight, model.coef_, rtol=0, atol=5e-4)
    unseen = overlapping_clouds(classes, count=2000, seed=1)[0].to(dtype) * scale + 5
    probabilities = head(unseen.float()).softmax(1).detach().numpy()
    expected = model.predict_proba(scaler.transform(unseen.double().numpy()))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-3)  # with weights up to 12
    assert (probabilities.argmax(1) == expected.argmax(1)).mean() >= 0.995


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("C", [1e-4, 1.0, 1e4])
def test_gradient_vanishes_at_the_solution(classes: int, C: float) -> None:
    features, target = overlapping_clouds(classes)
    head = fit_head(features, target, classes, C=C)
    standard = head.standardize(features).double()
    weight, bias = (p.detach().double().requires_grad_() for p in (head.linear.weight, head.linear.bias))
    loss = torch.nn.functional.cross_entropy(standard @ weight.T + bias, target)
    penalised = weight[1] - weight[0] if classes == 2 else weight
    objective = loss + penalised.square().sum() / (2 * C * len(features))
    gradients = torch.autograd.grad(objective, (weight, bias))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1.1e-5  # the tolerance, and float32 weights


def test_penalty_has_the_least_cross_entropy_on_left_out_images() -> None:
    features, target = (part.numpy() for part in overlapping_clouds(3))
    losses = []
    with threadpool_limits(1):
        for C in INVERSE_PENALTIES:
            model = LogisticRegression(C=C, tol=1e-5, max_iter=5000)
            fold_losses = []
            for inside, outside in StratifiedKFold(5, shuffle=True, random_state=1).split(features, target):
                probabilities = model.fit(features[inside], target[inside]).predict_proba(features[outside])
                likelihood = probabilities[np.arange(len(outside)), target[outside]]
                fold_losses.append(-np.log(likelihood.clip(1e-30)).mean())
            losses.append(np.mean(fold_losses))
    best = INVERSE_PENALTIES[int(np.argmin(losses))]
    assert choose_inverse_penalty(*overlapping_clouds(3), folds=5, seed=1) == best
    assert INVERSE_PENALTIES[0] < best < INVERSE_PENALTIES[-1]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    features, target = overlapping_clouds(8, count=2000, features=256)
    weights = []
    for count in (1, 2):
        with threadpool_limits(count):  # in single precision, rounding would hide the difference
            weights.append(solve(features, target, 1.0, tolerance=1e-5, max_steps=1000).weight)
    assert torch.equal(*weights)


def test_separable_classes_converge() -> None:
    features, target = overlapping_clouds(2, features=600)
    head = LogisticRegressionHead(600, 2, C=1e4)
    assert ", converged after " in head.fit(features, target, seed=0)
    assert (head.eval()(features).argmax(1) == target).all()


def test_missing_convergence_is_reported_and_raises_no_warning() -> None:
    features, target = overlapping_clouds(3)
    summary = LogisticRegressionHead(30, 3, C=10.0, max_steps=3).fit(features, target, seed=0)
    assert summary == "C = 10 given, NOT converged: raise max_steps or lower C after 3 steps"


def test_summary_tells_how_C_was_chosen() -> None:
    features, target = overlapping_clouds(3)
    assert LogisticRegressionHead(30, 3, C=0.1).fit(features, target, 0).startswith("C = 0.1 given, converged after ")
    assert " by cross-validation, converged after " in LogisticRegressionHead(30, 3).fit(features, target, 0)


def test_linear_head_and_logistic_regression_load_each_other() -> None:
    features, target = overlapping_clouds(3)
    head = fit_head(features, target, 3)
    linear = LinearHead(30, 3, standardize=True)
    linear.load_state_dict(head.state_dict())
    assert torch.equal(linear.eval()(features), head(features))
    again = LogisticRegressionHead(30, 3)
    again.load_state_dict(linear.state_dict())
    assert torch.equal(again.eval()(features), head(features))


def test_features_that_are_not_finite_are_refused_with_a_remedy() -> None:
    features, target = overlapping_clouds(2)
    features[3, 3] = float("nan")
    features[5, 0] = float("inf")
    with pytest.raises(ValueError, match=r"2 of 400 training images have features that are not finite.*32-true"):
        fit_head(features, target, 2)


def test_fewer_images_than_folds_are_refused() -> None:
    target = torch.tensor([0] * 7 + [1] * 3)
    with pytest.raises(ValueError, match="the smallest class has 3 training images, too few for 5 folds"):
        fit_head(torch.randn(10, 4), target, 2)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        fit_head(torch.randn(10, 4), torch.zeros(10, dtype=torch.int64), 1, C=1.0)
