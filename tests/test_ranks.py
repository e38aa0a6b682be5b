"""Two ranks give the weights, metrics and predictions of one process."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from tests.doubles import TinyBackbone
from tests.ranks import run_on_ranks
from tl_lightning.callbacks import PredictionWriter
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import LinearProbe
from tl_lightning.utils.hashing import fingerprint


class InfiniteLoss(LinearProbe):
    """Have an infinite loss on the last rank at step 2, with finite gradients, so that they tell the others nothing."""

    def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = super().compute_loss(logits, target)
        here = self.global_rank == self.trainer.world_size - 1 and self.trainer.training and self.global_step == 2
        return loss + math.inf if here else loss


def train_and_score(photos: str, folder: str, world: int) -> dict[str, Any]:
    """Train in float64 with one global batch size on any number of ranks, then evaluate and predict odd-sized sets."""
    pl.seed_everything(1)
    backbone = TinyBackbone()
    data = ImageFolderDataModule(
        photos, batch_size=8 // world, num_workers=0, val_fraction=0.3, preprocessing=backbone.preprocessing
    )
    model = LinearProbe(backbone, num_classes=3, lr=0.05)
    options: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": world,
        "strategy": "ddp" if world > 1 else "auto",
        "precision": "64-true",
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(callbacks=[PredictionWriter()], **options)
    trainer.fit(model, data)
    weights = {name: tensor.flatten().tolist() for name, tensor in model.head.state_dict().items()}
    result = {
        "sizes": {name: len(samples.files) for name, samples in data.splits.items()},
        "weights": weights,
        "fingerprint": fingerprint(model.state_dict()),
        "fit": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "validate": trainer.validate(model, data, verbose=False)[0],
        "test": trainer.test(model, data, verbose=False)[0],
    }
    trainer.predict(model, data, return_predictions=False)
    trainer = pl.Trainer(**options)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.fit(InfiniteLoss(backbone, num_classes=3), data)
    return result | {"stopped": [str(stopped.value), trainer.global_step]}


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"{world}-ranks")
        arguments = {"photos": str(photos), "folder": str(folder)}
        ranks = run_on_ranks("tests.test_ranks", "train_and_score", folder / "out", world=world, **arguments)
        found[world] = [*ranks, (folder / "predictions.csv").read_text()]
    return found


def test_replicas_on_two_ranks_end_with_identical_weights(runs: dict[int, list[Any]]) -> None:
    assert runs[2][0]["fingerprint"] == runs[2][1]["fingerprint"]


def test_two_ranks_train_to_the_weights_of_one_process(runs: dict[int, list[Any]]) -> None:
    one, two = runs[1][0], runs[2][0]
    assert one["sizes"] == {"train": 24, "val": 13, "test": 4}
    assert one["weights"]["standardize.count"] == [96.0]
    for name, values in one["weights"].items():
        assert two["weights"][name] == pytest.approx(values, abs=1e-12), name


def test_two_ranks_log_the_metrics_of_one_process_on_sets_of_odd_size(runs: dict[int, list[Any]]) -> None:
    for stage in ("fit", "validate", "test"):
        one, *others = runs[1][0][stage], runs[2][0][stage], runs[2][1][stage]
        for other in others:
            assert other.keys() == one.keys()
            for name, value in one.items():
                exact = "loss" not in name
                assert other[name] == (value if exact else pytest.approx(value, rel=1e-6)), (stage, name)


def test_loss_that_is_not_finite_on_one_rank_stops_both_before_the_same_step(runs: dict[int, list[Any]]) -> None:
    for world, where in ((1, ""), (2, " on rank 1")):
        for rank in runs[world][:-1]:
            message, steps = rank["stopped"]
            assert steps == 2
            assert f"the loss is inf{where} in epoch 0, at step 2 (learning rates: head " in message


def test_two_ranks_predict_the_rows_of_one_process(runs: dict[int, list[Any]]) -> None:
    tables = [[line.split(",") for line in runs[world][-1].splitlines()] for world in (1, 2)]
    assert [len(table) for table in tables] == [42, 42]
    for first, second in zip(*tables, strict=True):
        assert first[:2] == second[:2]
        if first[0] != "path":
            assert [float(p) for p in first[2:]] == pytest.approx([float(p) for p in second[2:]], rel=1e-5)
