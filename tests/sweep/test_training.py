"""Heads that are trained together equal heads that are trained one by one."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.heads.clouds import overlapping_clouds
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.heads import LinearHead, MLPHead
from tl_lightning.sweep import training as module
from tl_lightning.sweep.training import (
    HeadOptions,
    Loss,
    ProgressCallback,
    Training,
    train_head,
    train_heads,
    train_heads_together,
)


def make_training(classes: int = 3, count: int = 230, features: int = 20, epochs: int = 4) -> Training:
    rows, target = overlapping_clouds(classes, count=count, features=features)
    sampler = DistributedBatchSampler(count, 32, shuffle=True, seed=1)

    def batches(epoch: int) -> Iterator[Tensor]:
        sampler.set_epoch(epoch)
        return (index for index, _ in sampler.batches())

    return Training(rows, target, batches, epochs, nn.functional.cross_entropy)


def fifty_heads(classes: int, features: int, standardize: bool) -> tuple[list[LinearHead], list[HeadOptions]]:
    torch.manual_seed(0)
    head = LinearHead(features, classes, standardize=standardize)
    options = [
        HeadOptions(lr, decay) for lr in torch.logspace(-4, -1, 10).tolist() for decay in (0.0, 1e-3, 1e-2, 0.1, 1.0)
    ]
    return [copy.deepcopy(head) for _ in options], options


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_heads_trained_together_equal_heads_trained_one_by_one(standardize: bool, classes: int) -> None:
    training = make_training(classes)
    together, options = fifty_heads(classes, 20, standardize)
    alone = copy.deepcopy(together)
    train_heads_together(together, options, training)
    for head, own in zip(alone, options, strict=True):
        train_head(head, own, training)
    for one, other in zip(together, alone, strict=True):
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-5)
        assert not one.training
    assert len({tuple(head.linear.weight.flatten().tolist()) for head in together}) == 50


def test_heads_trained_together_use_the_given_loss() -> None:
    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target, label_smoothing=0.3)

    training = make_training()._replace(loss=smoothed)
    together, options = fifty_heads(3, 20, standardize=True)
    alone = copy.deepcopy(together[7])
    train_heads_together(together, options, training)
    train_head(alone, options[7], training)
    torch.testing.assert_close(together[7].linear.weight, alone.linear.weight, rtol=1e-5, atol=1e-5)


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups of heads that were trained together."""
    sizes: list[int] = []

    def spy(
        heads: list[LinearHead], options: list[HeadOptions], training: Training, *on_progress: ProgressCallback
    ) -> None:
        sizes.append(len(heads))
        train_heads_together(heads, options, training, *on_progress)

    monkeypatch.setattr(module, "train_heads_together", spy)
    return sizes


def test_only_linear_heads_without_dropout_are_trained_together(batched: list[int]) -> None:
    training = make_training(epochs=2)
    plain, options = fifty_heads(3, 20, standardize=True)
    heads: list[nn.Module] = [*plain[:6], MLPHead(20, 3, hidden=(8,)), LinearHead(20, 3, dropout=0.5), MLPHead(20, 3)]
    expected = [copy.deepcopy(head) for head in heads]
    for head, own in zip(expected, options, strict=False):
        train_head(head, own, training)
    train_heads(heads, options[: len(heads)], training)
    assert batched == [6]
    for head, other in zip(heads, expected, strict=True):
        for name, tensor in head.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("classes", "together"), [(2, True), (78, True), (79, False)])
def test_size_of_a_head_decides_whether_heads_are_trained_together(
    classes: int, together: bool, batched: list[int]
) -> None:
    training = make_training(classes, count=64, features=1280, epochs=1)
    for count in (2, 5):
        batched.clear()
        train_heads([LinearHead(1280, classes) for _ in range(count)], [HeadOptions(1e-3, 0.0)] * count, training)
        assert batched == ([count] if together else [])


def branching(logits: Tensor, target: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(logits, target)
    return loss * 2 if loss.item() > 1 else loss


def drawing(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(nn.functional.dropout(logits, 0.1), target)


@pytest.mark.parametrize("loss", [branching, drawing])
def test_loss_that_vmap_refuses_trains_one_head_at_a_time(loss: Loss, batched: list[int]) -> None:
    training = make_training(epochs=2)._replace(loss=loss)
    heads, options = fifty_heads(3, 20, standardize=True)
    alone = copy.deepcopy(heads[4])
    train_heads(heads[:6], options[:6], training)
    train_head(alone, options[4], training)
    assert not batched
    assert torch.equal(heads[4].linear.weight, alone.linear.weight)
