"""Train many heads on cached features, and choose one of them on images that it was not trained on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.evaluation import Interval, bias_corrected_best, simplest_within_one_standard_error
from tl_lightning.sweep.candidates import Candidate, HeadInput
from tl_lightning.sweep.training import Loss, ProgressCallback, Training, ignore_progress, train_heads
from tl_lightning.utils.seeding import derive_seed, seeded, use_rng_state

_MIN_VAL_IMAGES = 2  # a standard error needs two

SamplerFactory = Callable[[int], DistributedBatchSampler]
"""Builds the sampler of batches for a number of samples."""


class LabelledFeatures(NamedTuple):
    """The features and classes of some images."""

    features: Mapping[HeadInput, Tensor]
    """Pooled features (N, D), or spatial maps (N, C, h, w)."""
    target: Tensor
    """Class numbers (N,)."""

    def select(self, index: Tensor) -> "LabelledFeatures":
        """Return the rows at the given places (n,)."""
        index = index.to(self.target.device)
        return LabelledFeatures({key: rows[index] for key, rows in self.features.items()}, self.target[index])

    def concatenate(self, others: "LabelledFeatures") -> "LabelledFeatures":
        """Return these rows, followed by others."""
        features = {key: torch.cat([rows, others.features[key]]) for key, rows in self.features.items()}
        return LabelledFeatures(features, torch.cat([self.target, others.target]))


class SearchResult(NamedTuple):
    """The scores of all candidates, and the chosen one."""

    candidates: Sequence[Candidate]
    accuracy: Tensor
    """Accuracy of each candidate on images that it was not trained on (candidates,)."""
    loss: Tensor
    """Mean cross-entropy of each candidate on these images (candidates,)."""
    chosen: int
    """Place of the chosen candidate."""
    head: nn.Module
    """The chosen head, trained on the training images."""
    interval: Interval
    """Accuracy of the chosen candidate, corrected for the optimism of the selection, with its confidence interval."""


def search(
    candidates: Sequence[Candidate],
    train: LabelledFeatures,
    val: LabelledFeatures,
    *,
    num_classes: int,
    loss: Loss,
    epochs: int,
    make_sampler: SamplerFactory,
    seed: int,
    rng_state: Tensor,
    folds: int = 0,
    on_progress: ProgressCallback = ignore_progress,
) -> SearchResult:
    """Train every candidate, and choose the simplest one whose accuracy is within one standard error of the best.

    The simplest one has the fewest parameters, those of the network before the head included. Then comes the largest
    weight decay, then the lowest learning rate.

    Args:
        candidates: The heads to compare, with their options.
        train: Training images.
        val: Validation images, on which the candidates are compared. With ``folds``, both together are divided, and
            each part is left out once.
        num_classes: Number K of classes.
        loss: The loss that trains all heads.
        epochs: Number of epochs for each head.
        make_sampler: Builds the sampler of the training batches.
        seed: Seed of dropout and of the folds.
        rng_state: State of torch's generator from which the first weights of each head are drawn.
        folds: Number of folds; 0 compares on ``val``.
        on_progress: Called after each epoch; :func:`count_epochs` counts all of them.

    Raises:
        ValueError: There is no candidate, or there are too few images to compare.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second to import

    if not candidates:
        raise ValueError("there is nothing to compare: give at least one learning rate, weight decay and head")

    def fit(some: Sequence[Candidate], samples: LabelledFeatures) -> list[nn.Module]:
        return _train_candidates(
            some,
            samples,
            num_classes=num_classes,
            loss=loss,
            epochs=epochs,
            make_sampler=make_sampler,
            seed=seed,
            rng_state=rng_state,
            on_progress=on_progress,
        )

    check_enough_images(train.target, val.target, num_classes, folds)
    if folds:
        both = train.concatenate(val)
        labels = both.target.cpu().numpy()
        splitter = StratifiedKFold(folds, shuffle=True, random_state=derive_seed(seed, "folds") % 2**32)
        correct = torch.zeros(len(candidates), len(labels), dtype=torch.bool)
        losses = torch.zeros(len(candidates), len(labels))
        for inside, outside in splitter.split(labels, labels):
            heads = fit(candidates, both.select(torch.from_numpy(inside)))
            left_out = both.select(torch.from_numpy(outside))
            correct[:, outside], losses[:, outside] = _evaluate(candidates, heads, left_out)
    else:
        heads = fit(candidates, train)
        correct, losses = _evaluate(candidates, heads, val)
    sizes = [_count_parameters(candidate, train, num_classes) for candidate in candidates]
    simplest_first = sorted(
        range(len(candidates)),
        key=lambda n: (sizes[n], -candidates[n].options.weight_decay, candidates[n].options.lr),
    )
    simplicity = [simplest_first.index(n) for n in range(len(candidates))]
    chosen = simplest_within_one_standard_error(correct, simplicity)
    interval = bias_corrected_best(correct, simplicity, seed=derive_seed(seed, "interval"))
    head = fit([candidates[chosen]], train)[0] if folds else heads[chosen]
    return SearchResult(candidates, correct.double().mean(1), losses.double().mean(1), chosen, head, interval)


def check_enough_images(train_target: Tensor, val_target: Tensor, num_classes: int, folds: int) -> None:
    """Make sure that there are enough images to compare candidates.

    Args:
        train_target: Class numbers of the training images (N,).
        val_target: Class numbers of the validation images (M,).
        num_classes: Number K of classes.
        folds: Number of folds; 0 compares on the validation images.

    Raises:
        ValueError: There are too few validation images, or a class has fewer images than there are folds.
    """
    if not folds:
        if len(val_target) < _MIN_VAL_IMAGES:
            raise ValueError(
                f"there are {len(val_target)} validation images to choose by, and at least {_MIN_VAL_IMAGES} are "
                "needed: compare by cross-validation, with folds=5, or give a larger val_fraction"
            )
        return
    smallest = int(torch.bincount(torch.cat([train_target, val_target]), minlength=num_classes).min())
    if folds < 2 or smallest < folds:
        possible = f"give 2 to {smallest}, or 0" if smallest > 1 else "give 0"
        raise ValueError(
            f"folds is {folds}, and the smallest class has {smallest} training and validation images; {possible} to "
            "choose on the validation images"
        )


def count_epochs(candidates: Sequence[Candidate], *, epochs: int, folds: int = 0) -> int:
    """Return the number of epochs that a search trains, added up over heads."""
    return len(candidates) * epochs * max(folds, 1) + (epochs if folds else 0)


def _train_candidates(
    candidates: Sequence[Candidate],
    samples: LabelledFeatures,
    *,
    num_classes: int,
    loss: Loss,
    epochs: int,
    make_sampler: SamplerFactory,
    seed: int,
    rng_state: Tensor,
    on_progress: ProgressCallback,
) -> list[nn.Module]:
    sampler = make_sampler(len(samples.target))

    def batches(epoch: int) -> Iterator[Tensor]:
        sampler.set_epoch(epoch)
        return (index for index, _ in sampler.batches())

    heads: list[nn.Module] = []
    for candidate in candidates:
        features = samples.features[candidate.head_input]
        with use_rng_state(rng_state):
            heads.append(candidate.head(features.shape[1], num_classes).to(features.device))
    for head_input in dict.fromkeys(candidate.head_input for candidate in candidates):
        numbers = [n for n, candidate in enumerate(candidates) if candidate.head_input == head_input]
        training = Training(samples.features[head_input], samples.target, batches, epochs, loss, seed)
        train_heads([heads[n] for n in numbers], [candidates[n].options for n in numbers], training, on_progress)
    return heads


@torch.no_grad()
def _evaluate(
    candidates: Sequence[Candidate], heads: Sequence[nn.Module], samples: LabelledFeatures
) -> tuple[Tensor, Tensor]:
    """Return whether each head is correct on each sample, and its cross-entropy there; both (heads, N)."""
    correct, losses = [], []
    for candidate, head in zip(candidates, heads, strict=True):
        logits = head(samples.features[candidate.head_input])
        correct.append((logits.argmax(1) == samples.target) & logits.isfinite().all(1))  # a diverged head is wrong
        losses.append(nn.functional.cross_entropy(logits.float(), samples.target, reduction="none"))
    return torch.stack(correct).cpu(), torch.stack(losses).cpu()


def _count_parameters(candidate: Candidate, samples: LabelledFeatures, num_classes: int) -> int:
    with seeded(0, "size"):
        head = candidate.head(samples.features[candidate.head_input].shape[1], num_classes)
    return candidate.backbone_size + sum(parameter.numel() for parameter in head.parameters())
