import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from tests.heads.clouds import overlapping_clouds
from tl_lightning.heads import ClassMeanHead, LogisticRegressionHead, NearestNeighbourHead


def test_class_means_are_scikit_learns() -> None:
    features, target = overlapping_clouds(4)
    head = ClassMeanHead(30, 4)
    head.fit(features, target, seed=0)
    scaler = StandardScaler().fit(features.numpy())
    theirs = NearestCentroid().fit(scaler.transform(features.numpy()), target.numpy())
    unseen, _ = overlapping_clouds(4, seed=1)
    ours = head.eval()(unseen).argmax(1).numpy()
    assert (ours == theirs.predict(scaler.transform(unseen.numpy()))).mean() >= 0.995


def test_neighbours_vote_by_similarity() -> None:
    features, target = overlapping_clouds(3, count=90)
    head = NearestNeighbourHead(30, 3, neighbours=7, temperature=0.1)
    head.fit(features, target, seed=0)
    unseen, _ = overlapping_clouds(3, count=20, seed=1)
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
    features, target = overlapping_clouds(2)
    with pytest.raises(ValueError, match=r"no training images of the classes \[2\]"):
        head.fit(features, target, seed=0)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="C is -1"):
        LogisticRegressionHead(3, 2, C=-1)
    with pytest.raises(ValueError, match="folds is 1"):
        LogisticRegressionHead(3, 2, folds=1)
    with pytest.raises(ValueError, match="neighbours is 0"):
        NearestNeighbourHead(3, 2, neighbours=0)
