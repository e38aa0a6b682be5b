"""Try many heads on stored features, and choose one by images that it was not trained on."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tl_lightning.chance import derive_seed, seeded
from tl_lightning.data.order import EpochBatches
from tl_lightning.evaluation import Interval, best_of_many, simplest_within_one_standard_error
from tl_lightning.heads import HeadCallable
from tl_lightning.heads.penalty import stratified_folds
from tl_lightning.sweep.training import Loss, Rates, Training, train


class Candidate(NamedTuple):
    """What is tried."""

    head: HeadCallable
    rates: Rates

    @property
    def name(self) -> str:
        """Name of the head's class."""
        made = self.head.func if isinstance(self.head, functools.partial) else self.head
        return getattr(made, "__name__", str(made))


class Samples(NamedTuple):
    """Labelled features."""

    features: Tensor
    """(N, D)."""
    target: Tensor
    """Class numbers (N,)."""


class Found(NamedTuple):
    """What came out of a search."""

    candidates: Sequence[Candidate]
    accuracy: Tensor
    """Of each candidate on images that it was not trained on (candidates,)."""
    loss: Tensor
    """Mean cross-entropy on them (candidates,)."""
    chosen: int
    head: nn.Module
    """The chosen one, trained on the training images."""
    interval: Interval
    """Of the chosen one's accuracy, with what choosing added taken off."""


def search(
    candidates: Sequence[Candidate],
    train_samples: Samples,
    val_samples: Samples,
    *,
    num_classes: int,
    loss: Loss,
    epochs: int,
    batch_size: int,
    seed: int,
    folds: int = 0,
) -> Found:
    """Train every candidate, and choose the simplest of those that are as good as the best but for chance.

    A head is simpler than one with more parameters, then than one with less weight decay, then than one with a higher rate.

    Args:
        candidates: What is tried.
        train_samples: What they are trained on.
        val_samples: What they are compared on; with ``folds``, both together, each part left out once.
        num_classes: Number K of classes.
        loss: What they are trained by.
        epochs: How long.
        batch_size: Samples per step.
        seed: Of initial weights, order and folds.
        folds: Number of folds; 0 compares on ``val_samples``.

    Raises:
        ValueError: There is no candidate.
    """
    if not candidates:
        raise ValueError("there is nothing to compare: give at least one rate, weight decay and head")
    fit = functools.partial(_train, num_classes=num_classes, loss=loss, epochs=epochs, batch_size=batch_size, seed=seed)
    if folds:
        features = torch.cat([train_samples.features, val_samples.features])
        target = torch.cat([train_samples.target, val_samples.target])
        fold = stratified_folds(target, folds, derive_seed(seed, "folds"))
        right = torch.zeros(len(candidates), len(target), dtype=torch.bool)
        losses = torch.zeros(len(candidates), len(target))
        for number in range(folds):
            inside, outside = fold != number, fold == number
            heads = fit(candidates, Samples(features[inside], target[inside]))
            right[:, outside.cpu()], losses[:, outside.cpu()] = _judge(
                heads, Samples(features[outside], target[outside])
            )
    else:
        heads = fit(candidates, train_samples)
        right, losses = _judge(heads, val_samples)
    sizes = [_size(candidate, train_samples.features.shape[1], num_classes) for candidate in candidates]
    order = sorted(
        range(len(candidates)),
        key=lambda n: (sizes[n], -candidates[n].rates.weight_decay, candidates[n].rates.lr),
    )
    simplicity = [order.index(n) for n in range(len(candidates))]
    chosen = simplest_within_one_standard_error(right, simplicity)
    interval = best_of_many(right, chosen, simplicity, seed=derive_seed(seed, "interval"))
    head = fit([candidates[chosen]], train_samples)[0] if folds else heads[chosen]
    return Found(candidates, right.double().mean(1), losses.double().mean(1), chosen, head, interval)


def _train(
    candidates: Sequence[Candidate],
    samples: Samples,
    *,
    num_classes: int,
    loss: Loss,
    epochs: int,
    batch_size: int,
    seed: int,
) -> list[nn.Module]:
    order = EpochBatches(len(samples.target), batch_size, shuffle=True, seed=seed)

    def batches(epoch: int) -> Iterator[Tensor]:
        order.set_epoch(epoch)
        return (index for index, _ in order.batches())

    heads = []
    for candidate in candidates:
        with seeded(seed, "head"):
            heads.append(candidate.head(samples.features.shape[1], num_classes).to(samples.features.device))
    with seeded(seed, "training"):
        train(heads, [candidate.rates for candidate in candidates], Training(*samples, batches, epochs, loss))
    return heads


@torch.no_grad()
def _judge(heads: Sequence[nn.Module], samples: Samples) -> tuple[Tensor, Tensor]:
    """Return whether each head is right on each sample, and its cross-entropy there."""
    right, losses = [], []
    for head in heads:
        scores = head(samples.features)
        right.append(scores.argmax(1) == samples.target)
        losses.append(nn.functional.cross_entropy(scores.float(), samples.target, reduction="none"))
    return torch.stack(right).cpu(), torch.stack(losses).cpu()


def _size(candidate: Candidate, in_features: int, num_classes: int) -> int:
    with seeded(0, "size"):
        return sum(parameter.numel() for parameter in candidate.head(in_features, num_classes).parameters())
