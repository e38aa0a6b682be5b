import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from tests.heads.test_logistic import samples
from tl_lightning.heads import ClassMeanHead, LinearHead, LogisticRegressionHead, NearestNeighbourHead


def test_logistic_regression_standardises() -> None:
    features, target = samples(3)
    features = features * torch.linspace(0.01, 100, 30) + 5
    head = LogisticRegressionHead(30, 3, C=0.1)
    assert head.fit(features, target, seed=0).startswith("C = 0.1 given, converged after ")
    scaler = StandardScaler().fit(features.numpy())
    theirs = LogisticRegression(C=0.1, tol=1e-6).fit(scaler.transform(features.numpy()), target.numpy())
    unseen, _ = samples(3, seed=1)
    unseen = unseen * torch.linspace(0.01, 100, 30) + 5
    assert (head.eval()(unseen).argmax(1).numpy() == theirs.predict(scaler.transform(unseen.numpy()))).mean() >= 0.995


def test_logistic_regression_loads_into_a_probe_and_back() -> None:
    features, target = samples(3)
    head = LogisticRegressionHead(30, 3)
    assert "by cross-validation, converged" in head.fit(features, target, seed=0)
    probe = LinearHead(30, 3, standardize=True)
    probe.load_state_dict(head.state_dict())
    assert torch.equal(probe.eval()(features), head.eval()(features))
    again = LogisticRegressionHead(30, 3)
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again.eval()(features), head(features))


def test_a_solution_that_is_none_says_so() -> None:
    features, target = samples(3)
    assert "NOT converged" in LogisticRegressionHead(30, 3, C=10.0, max_steps=3).fit(features, target, seed=0)


def test_class_means_are_scikit_learns() -> None:
    features, target = samples(4)
    head = ClassMeanHead(30, 4)
    head.fit(features, target, seed=0)
    scaler = StandardScaler().fit(features.numpy())
    theirs = NearestCentroid().fit(scaler.transform(features.numpy()), target.numpy())
    unseen, _ = samples(4, seed=1)
    ours = head.eval()(unseen).argmax(1).numpy()
    assert (ours == theirs.predict(scaler.transform(unseen.numpy()))).mean() >= 0.995


def test_neighbours_vote_by_similarity() -> None:
    features, target = samples(3, count=90)
    head = NearestNeighbourHead(30, 3, neighbours=7, temperature=0.1)
    head.fit(features, target, seed=0)
    unseen, _ = samples(3, count=20, seed=1)
    found = head(unseen).exp()
    bank = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    for row, sample in zip(found, unseen.numpy(), strict=True):
        cosine = bank @ (sample / np.linalg.norm(sample))
        near = np.argsort(-cosine)[:7]
        votes = np.bincount(target.numpy()[near], np.exp(cosine[near] / 0.1), 3)
        np.testing.assert_allclose(row.detach().numpy(), np.maximum(votes / votes.sum(), 1e-6), rtol=1e-4)
    again = NearestNeighbourHead(30, 3, neighbours=7, temperature=0.1)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(unseen), head(unseen))


@pytest.mark.parametrize("head", [LogisticRegressionHead(30, 3), ClassMeanHead(30, 3)])
def test_a_class_without_images_is_named(head: LogisticRegressionHead | ClassMeanHead) -> None:
    features, target = samples(2)
    with pytest.raises(ValueError, match=r"no training images of the classes \[2\]"):
        head.fit(features, target, seed=0)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="C is -1"):
        LogisticRegressionHead(3, 2, C=-1)
    with pytest.raises(ValueError, match="folds is 1"):
        LogisticRegressionHead(3, 2, folds=1)
    with pytest.raises(ValueError, match="neighbours is 0"):
        NearestNeighbourHead(3, 2, neighbours=0)
