"""Try many heads on stored features, and choose one by images that it was not trained on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.evaluation import Interval, bias_corrected_best, simplest_within_one_standard_error
from tl_lightning.sweep.candidates import Candidate, Source
from tl_lightning.sweep.training import Advance, Loss, Training, ignore, train
from tl_lightning.utils.seeding import derive_seed, from_rng_state, seeded

_FEWEST = 2  # of which there is a standard error

Order = Callable[[int], DistributedBatchSampler]
"""From a number of samples to their batches."""


class LabelledFeatures(NamedTuple):
    """Labelled features."""

    features: Mapping[Source, Tensor]
    """(N, D), or (N, C, h, w) before pooling."""
    target: Tensor
    """Class numbers (N,)."""

    def at(self, places: Tensor) -> "LabelledFeatures":
        """Return the rows at some places (n,)."""
        places = places.to(self.target.device)
        return LabelledFeatures({source: rows[places] for source, rows in self.features.items()}, self.target[places])

    def followed_by(self, others: "LabelledFeatures") -> "LabelledFeatures":
        """Return these, and others after them."""
        both = {source: torch.cat([rows, others.features[source]]) for source, rows in self.features.items()}
        return LabelledFeatures(both, torch.cat([self.target, others.target]))


class SearchResult(NamedTuple):
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
    train_samples: LabelledFeatures,
    val_samples: LabelledFeatures,
    *,
    num_classes: int,
    loss: Loss,
    epochs: int,
    order: Order,
    seed: int,
    rng_state: Tensor,
    folds: int = 0,
    advance: Advance = ignore,
) -> SearchResult:
    """Train every candidate, and choose the simplest of those that are as good as the best but for chance.

    Simpler is what has fewer parameters, those of the network before the head included; then more weight decay; then a lower
    rate.

    Args:
        candidates: What is tried.
        train_samples: What they are trained on.
        val_samples: What they are compared on; with ``folds``, both together, each part left out once.
        num_classes: Number K of classes.
        loss: What they are trained by.
        epochs: How long.
        order: Their batches.
        seed: Of dropout and folds.
        rng_state: State of torch's generator that each head's first weights are drawn from.
        folds: Number of folds; 0 compares on ``val_samples``.
        advance: Told, now and then, how many epochs of heads have been trained since; :func:`work` says how many there are.

    Raises:
        ValueError: There is no candidate, or a class has fewer images than there are folds.
    """
    if not candidates:
        raise ValueError("there is nothing to compare: give at least one rate, weight decay and head")

    def fit(tried: Sequence[Candidate], samples: LabelledFeatures) -> list[nn.Module]:
        return _train(
            tried,
            samples,
            num_classes=num_classes,
            loss=loss,
            epochs=epochs,
            order=order,
            seed=seed,
            rng_state=rng_state,
            advance=advance,
        )

    from sklearn.model_selection import StratifiedKFold  # takes a second to import

    check_enough(train_samples.target, val_samples.target, num_classes, folds)
    if folds:
        both = train_samples.followed_by(val_samples)
        labels = both.target.cpu().numpy()
        splitter = StratifiedKFold(folds, shuffle=True, random_state=derive_seed(seed, "folds") % 2**32)
        right = torch.zeros(len(candidates), len(labels), dtype=torch.bool)
        losses = torch.zeros(len(candidates), len(labels))
        for inside, outside in splitter.split(labels, labels):
            heads = fit(candidates, both.at(torch.from_numpy(inside)))
            right[:, outside], losses[:, outside] = _judge(candidates, heads, both.at(torch.from_numpy(outside)))
    else:
        heads = fit(candidates, train_samples)
        right, losses = _judge(candidates, heads, val_samples)
    sizes = [_size(candidate, train_samples, num_classes) for candidate in candidates]
    ranked = sorted(
        range(len(candidates)),
        key=lambda n: (sizes[n], -candidates[n].rates.weight_decay, candidates[n].rates.lr),
    )
    simplicity = [ranked.index(n) for n in range(len(candidates))]
    chosen = simplest_within_one_standard_error(right, simplicity)
    interval = bias_corrected_best(right, simplicity, seed=derive_seed(seed, "interval"))
    head = fit([candidates[chosen]], train_samples)[0] if folds else heads[chosen]
    return SearchResult(candidates, right.double().mean(1), losses.double().mean(1), chosen, head, interval)


def check_enough(train_target: Tensor, val_target: Tensor, num_classes: int, folds: int) -> None:
    """Make sure that there are enough images to choose by.

    Args:
        train_target: Class numbers (N,) of the training images.
        val_target: Those of the validation images.
        num_classes: Number K of classes.
        folds: Number of folds; 0 compares on the validation images.

    Raises:
        ValueError: There are not.
    """
    if not folds:
        if len(val_target) < _FEWEST:
            raise ValueError(
                f"there are {len(val_target)} validation images to choose by, and at least {_FEWEST} are needed: compare by "
                "cross-validation, with folds=5, or give a larger val_fraction"
            )
        return
    smallest = int(torch.bincount(torch.cat([train_target, val_target]), minlength=num_classes).min())
    if folds < 2 or smallest < folds:
        possible = f"give 2 to {smallest}, or 0" if smallest > 1 else "give 0"
        raise ValueError(
            f"folds is {folds}, and the smallest class has {smallest} images that may be chosen by; {possible} to choose on the "
            "validation images"
        )


def work(candidates: Sequence[Candidate], *, epochs: int, folds: int = 0) -> int:
    """Return how many epochs of heads a search trains."""
    return len(candidates) * epochs * max(folds, 1) + (epochs if folds else 0)


def _train(
    candidates: Sequence[Candidate],
    samples: LabelledFeatures,
    *,
    num_classes: int,
    loss: Loss,
    epochs: int,
    order: Order,
    seed: int,
    rng_state: Tensor,
    advance: Advance,
) -> list[nn.Module]:
    each_epoch = order(len(samples.target))

    def batches(epoch: int) -> Iterator[Tensor]:
        each_epoch.set_epoch(epoch)
        return (index for index, _ in each_epoch.batches())

    heads: list[nn.Module] = []
    for candidate in candidates:
        features = samples.features[candidate.takes]
        with from_rng_state(rng_state):
            heads.append(candidate.head(features.shape[1], num_classes).to(features.device))
    for source in dict.fromkeys(candidate.takes for candidate in candidates):
        here = [n for n, candidate in enumerate(candidates) if candidate.takes == source]
        training = Training(samples.features[source], samples.target, batches, epochs, loss, seed)
        train([heads[n] for n in here], [candidates[n].rates for n in here], training, advance)
    return heads


@torch.no_grad()
def _judge(
    candidates: Sequence[Candidate], heads: Sequence[nn.Module], samples: LabelledFeatures
) -> tuple[Tensor, Tensor]:
    """Return whether each head is right on each sample, and its cross-entropy there."""
    right, losses = [], []
    for candidate, head in zip(candidates, heads, strict=True):
        scores = head(samples.features[candidate.takes])
        right.append((scores.argmax(1) == samples.target) & scores.isfinite().all(1))  # what diverged is never right
        losses.append(nn.functional.cross_entropy(scores.float(), samples.target, reduction="none"))
    return torch.stack(right).cpu(), torch.stack(losses).cpu()


def _size(candidate: Candidate, samples: LabelledFeatures, num_classes: int) -> int:
    with seeded(0, "size"):
        head = candidate.head(samples.features[candidate.takes].shape[1], num_classes)
    return candidate.network_size + sum(parameter.numel() for parameter in head.parameters())
