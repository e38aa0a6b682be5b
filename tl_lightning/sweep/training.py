"""Train many heads on the same features, together where that is faster."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from tl_lightning import optim
from tl_lightning.heads import LinearHead, Standardize
from tl_lightning.utils.seeding import seed_torch, seeded

Loss = Callable[[Tensor, Tensor], Tensor]
"""From class scores (n, K) and class numbers (n,) to their mean loss."""

_Kind = tuple[bool, torch.Size]  # whether it standardises, and the shape of its weights

Advance = Callable[[int], object]
"""Told how many epochs of heads have been trained since it was last told."""

_BETAS = (0.9, 0.999)  # of torch's AdamW, as is what follows
_EPS = 1e-8

_MAX_WEIGHTS = 100_000
"""Weights of one head (K x D) up to which heads are trained together.

Training together saves the fixed cost of each operation, which dominates for small heads. For large heads, the AdamW below is
slower than torch's. CPU time one by one over together, for 20 heads, one thread and batches of 32: 11x for 1280 -> 2 classes,
10x for 512 -> 10, 2.4x for 1280 -> 30, 1.4x for 512 -> 100, 0.9x for 1280 -> 100, 0.6x for 1280 -> 300. The break-even is at
about the same size with 2, 5 and 50 heads. A stopwatch would choose differently from run to run, and so change the bits.
"""


def ignore(epochs: int) -> None:
    """Take no notice of the progress."""


class HeadOptions(NamedTuple):
    """How a head is trained."""

    lr: float
    weight_decay: float


class Training(NamedTuple):
    """What heads are trained on."""

    features: Tensor
    """(N, D)."""
    target: Tensor
    """Class numbers (N,)."""
    batches: Callable[[int], Iterator[Tensor]]
    """From an epoch to the places of each batch's samples."""
    epochs: int
    loss: Loss
    seed: int = 0
    """Of what heads draw, as dropout: at each step as in a fit."""

    def steps(self, heads: int = 1, advance: Advance = ignore) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all batches of all epochs, each of so many heads."""
        for epoch in range(self.epochs):
            for index in self.batches(epoch):
                yield self.features[index], self.target[index]
            advance(heads)

    def total_steps(self) -> int:
        """Return the number of steps."""
        return self.epochs * sum(1 for _ in self.batches(0))


def train(
    heads: Sequence[nn.Module], rates: Sequence[HeadOptions], training: Training, advance: Advance = ignore
) -> None:
    """Train heads, each with its own rates, by AdamW with a warm-up and a cosine; together where that is faster.

    Args:
        heads: They are trained in place.
        rates: Of each head.
        training: What they are trained on.
        advance: Told after each epoch.
    """
    alike: dict[_Kind | None, list[int]] = {}
    for number, head in enumerate(heads):
        alike.setdefault(_kind(head), []).append(number)
    for kind, numbers in alike.items():
        group, own = [heads[n] for n in numbers], [rates[n] for n in numbers]
        if kind is not None and len(group) > 1 and _loss_can_be_batched(training, classes=kind[1][0]):
            train_together(group, own, training, advance)  # type: ignore[arg-type]  # they are linear
        else:
            for head, rate in zip(group, own, strict=True):
                train_alone(head, rate, training, advance)


def train_alone(head: nn.Module, rates: HeadOptions, training: Training, advance: Advance = ignore) -> None:
    """Train one head."""
    groups = optim.parameter_groups(head.named_parameters(), name="head", lr=rates.lr)
    optimizer = AdamW(groups, weight_decay=rates.weight_decay)
    total = training.total_steps()
    schedule = optim.warmup_cosine(optimizer, total)
    head.train()
    with seeded(training.seed):
        for step, (features, target) in enumerate(training.steps(1, advance)):
            seed_torch(training.seed, "step", step, step % (total // training.epochs), 0)
            loss = training.loss(head(features), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            schedule.step()
    head.eval()


def train_together(
    heads: Sequence[LinearHead], rates: Sequence[HeadOptions], training: Training, advance: Advance = ignore
) -> None:
    """Train linear heads in products of matrices: the scores of all of them are one product.

    Args:
        heads: All of them standardise, or none does; none drops features out.
        rates: Of each head.
        training: What they are trained on.
        advance: Told after each epoch.
    """
    count = len(heads)
    standardize = heads[0].standardize.train()
    parts = [
        torch.stack([head.linear.weight.detach() for head in heads]),  # (heads, K, D)
        torch.stack([head.linear.bias.detach() for head in heads]),  # (heads, K)
    ]
    lr = training.features.new_tensor([rate.lr for rate in rates])
    decay = training.features.new_tensor([rate.weight_decay for rate in rates])
    first, second = ([torch.zeros_like(part) for part in parts] for _ in range(2))
    losses = torch.vmap(training.loss, in_dims=(1, None))
    total = training.total_steps()
    for step, (features, target) in enumerate(training.steps(count, advance)):
        for part in parts:
            part.requires_grad_(True)
        weight, bias = parts
        scores = (standardize(features) @ weight.flatten(0, 1).T).view(len(features), count, -1) + bias
        gradients = torch.autograd.grad(losses(scores, target).sum(), parts)
        rate = lr * optim.warmup_cosine_factor(step, total)
        with torch.no_grad():
            for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
                part.requires_grad_(False)
                own = rate.view(-1, *[1] * (part.ndim - 1))
                if part.ndim > 2:  # biases are not decayed
                    part.mul_(1 - own * decay.view_as(own))
                first[i].lerp_(gradient, 1 - _BETAS[0])
                second[i].mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
                root = (second[i].sqrt() / (1 - _BETAS[1] ** (step + 1)) ** 0.5).add_(_EPS)
                part.sub_(own / (1 - _BETAS[0] ** (step + 1)) * first[i] / root)
    for number, head in enumerate(heads):
        with torch.no_grad():
            head.linear.weight.copy_(parts[0][number])
            head.linear.bias.copy_(parts[1][number])
        head.standardize.load_state_dict(standardize.state_dict())
        head.eval()


def _kind(head: nn.Module) -> _Kind | None:
    """Return the properties that heads trained together share; None for a head that is trained alone."""
    if type(head).forward is not LinearHead.forward or not isinstance(head, LinearHead) or head.dropout.p:
        return None
    if head.linear.weight.numel() > _MAX_WEIGHTS:
        return None
    return isinstance(head.standardize, Standardize), head.linear.weight.shape


def _loss_can_be_batched(training: Training, *, classes: int) -> bool:
    """Try the loss on the first batch: vmap refuses a loss that branches on values or draws random numbers.

    The operations of the loss decide, not the values, so the answer is the same in equal runs and on all ranks.
    https://docs.pytorch.org/docs/stable/func.ux_limitations.html
    """
    target = training.target[next(training.batches(0))]
    logits = training.features.new_zeros(len(target), 2, classes, requires_grad=True)
    try:
        losses = torch.vmap(training.loss, in_dims=(1, None))(logits, target)
        torch.autograd.grad(losses.sum(), logits)
    except RuntimeError:
        return False
    return True
