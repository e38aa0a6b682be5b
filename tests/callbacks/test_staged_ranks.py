"""Staged unfreezing on two processes: each test reads its part of the results of one pair of processes."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.callbacks.staged_runs import VARIANTS, Double, train
from tests.ranks import run_on_ranks
from tests.staged import EPOCHS, TRAINED

pytestmark = (
    pytest.mark.slow
)  # a pair of processes for over a minute; test_readme trains and resumes stages on two ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(photos: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the results of each of two processes."""
    return run_on_ranks(
        "tests.callbacks.staged_runs", "train", folder / "out", photos=str(photos), folder=str(folder / "two")
    )


@pytest.fixture(scope="module")
def one(photos: Path, folder: Path) -> dict[str, Any]:
    """Return the results of a single process: this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the two processes
        return train(str(photos), str(folder / "one"), world=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_as_one(variant: str, ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    expected = one["variants"][variant]["weights"]
    for rank in ranks:
        result = rank["variants"][variant]
        assert result["distances"] == [0.0] * EPOCHS
        assert max(abs(a - b) for a, b in zip(result["weights"], expected, strict=True)) <= 1e-12
        assert [tuple(stages) for stages in result["trained"]] == TRAINED


def test_old_ddp_wrappers_are_freed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["variants"]["plain"]["wrappers"] == 4, "one at the start, and one for each change of stage"
        assert rank["variants"]["plain"]["alive"] == 0


def test_ranks_are_compared_before_a_new_ddp_wrapper_makes_them_equal(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        frozen, trained = rank["diverged"]
        assert frozen.startswith("epoch 1: backbone.model.stem.conv.weight changed while frozen")
        assert trained.startswith("epoch 1: head.linear.weight differs between the 2 ranks")


def test_run_resumed_on_two_ranks_ends_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["resumed"] == ranks[1]["resumed"]
    for name, runs in ranks[0]["resumed"].items():
        assert len(runs) == 1 + EPOCHS + (3 * EPOCHS // 2 if name == "default" else 0)
        for checkpoint, result in runs.items():
            assert result[0] == runs["whole"][0], (name, checkpoint)
            assert result[1] == runs["whole"][1][EPOCHS - len(result[1]) :], (name, checkpoint)


def test_sharded_training_equals_one_process(ranks: list[dict[str, Any]], one: dict[str, Any], folder: Path) -> None:
    (expected,) = one["sharded"]
    names = ranks[0]["sharded"][0]["sharded"]
    sharded = {name.split(".")[2] if name.startswith("backbone") else "head" for name in names}
    assert sharded == {"head", "layer1", "layer2", "layer3"}, "a stage that never trains is not sharded"
    for rank in ranks:
        two, *resumed = rank["sharded"]
        for epoch, (given, wanted) in enumerate(zip(two["epochs"], expected["epochs"], strict=True)):
            for name, values in wanted.items():
                assert given[name] == pytest.approx(values, abs=1e-12), (epoch, name)
        assert [run["epochs"] for run in resumed] == [two["epochs"][2:3], two["epochs"][3:]]
    checkpoint = folder / "two" / "sharded" / f"epoch={EPOCHS - 1}.ckpt"
    loaded = dict(Double.load_from_checkpoint(checkpoint).named_parameters())
    for name, values in ranks[0]["sharded"][0]["epochs"][-1].items():
        in_single = pytest.approx(values, rel=1e-6)  # a loaded classifier is in single precision
        assert loaded[name].flatten().tolist() == in_single, "a checkpoint is one file, and enough"
