from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tests.doubles import TinyBackbone
from tests.heads.clouds import overlapping_clouds
from tests.ranks import run_on_ranks
from tests.staged import images, trainer
from tl_lightning.heads import ClassMeanHead, LogisticRegressionHead, NearestNeighbourHead
from tl_lightning.modules import FeatureCacheClassifier
from tl_lightning.utils.hashing import fingerprint


def test_class_means_classify_as_scikit_learns_nearest_centroid() -> None:
    features, target = overlapping_clouds(4)
    head = ClassMeanHead(30, 4)
    head.fit(features, target, seed=0)
    scaler = StandardScaler().fit(features.numpy())
    model = NearestCentroid().fit(scaler.transform(features.numpy()), target.numpy())
    unseen, _ = overlapping_clouds(4, seed=1)
    classes = head.eval()(unseen).argmax(1).numpy()
    assert (classes == model.predict(scaler.transform(unseen.numpy()))).mean() >= 0.995


def test_nearest_images_vote_with_weights_by_cosine() -> None:
    features, target = overlapping_clouds(3, count=90)
    head = NearestNeighbourHead(30, 3, neighbours=7, temperature=0.1)
    assert head.fit(features, target, seed=0) == "90 images stored, and the 7 nearest vote"
    unseen, _ = overlapping_clouds(3, count=20, seed=1)
    bank = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    for shares, sample in zip(head(unseen).exp(), unseen.numpy(), strict=True):
        cosine = bank @ (sample / np.linalg.norm(sample))
        nearest = np.argsort(-cosine)[:7]
        votes = np.bincount(target.numpy()[nearest], np.exp(cosine[nearest] / 0.1), 3)
        np.testing.assert_allclose(shares.detach().numpy(), np.maximum(votes / votes.sum(), 1e-6), rtol=1e-4)


def test_stored_images_load_from_a_state_dict() -> None:
    features, target = overlapping_clouds(3, count=90)
    head = NearestNeighbourHead(30, 3)
    head.fit(features, target, seed=0)
    loaded = NearestNeighbourHead(30, 3)
    loaded.load_state_dict(head.state_dict())
    assert torch.equal(loaded(features), head(features))


@pytest.mark.parametrize("head", [LogisticRegressionHead(30, 3), ClassMeanHead(30, 3)])
def test_class_without_images_is_refused_by_number(head: LogisticRegressionHead | ClassMeanHead) -> None:
    features, target = overlapping_clouds(2)
    with pytest.raises(ValueError, match=r"no training images of the classes \[2\]"):
        head.fit(features, target, seed=0)


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="C is -1"):
        LogisticRegressionHead(3, 2, C=-1)
    with pytest.raises(ValueError, match="folds is 1"):
        LogisticRegressionHead(3, 2, folds=1)
    with pytest.raises(ValueError, match="neighbours is 0"):
        NearestNeighbourHead(3, 2, neighbours=0)


class RankDependentHead(ClassMeanHead):
    """Stands for processors that round differently."""

    def fit(self, features: Tensor, target: Tensor, seed: int) -> str:
        summary = super().fit(features, target, seed)
        for tensor in self.state_dict().values():
            tensor += dist.get_rank()
        return summary


def fit_on_ranks(world: int, photos: str, folder: str) -> str:
    model, data = FeatureCacheClassifier(TinyBackbone(), 3, RankDependentHead), images(photos, augment=False)
    trainer(Path(folder), devices=world, strategy="ddp").fit(model, data)
    assert model.head.state_dict()["standardize.count"] == len(data.splits["train"].files)
    return fingerprint(model.state_dict())


@pytest.mark.slow
def test_all_ranks_take_the_head_of_rank_zero(photos: Path, tmp_path: Path) -> None:
    first, second = run_on_ranks(__name__, "fit_on_ranks", tmp_path / "out", photos=str(photos), folder=str(tmp_path))
    assert first == second
