"""Train many heads on the same features, small linear ones together."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from tl_lightning import optim
from tl_lightning.heads import LinearHead, Standardize
from tl_lightning.utils.seeding import seed_torch, seeded

Loss = Callable[[Tensor, Tensor], Tensor]
"""Computes the mean loss from logits (n, K) and class numbers (n,)."""

ProgressCallback = Callable[[int], object]
"""Called with the number of epochs that were trained since the last call, added up over heads."""

_BETAS = (0.9, 0.999)  # the defaults of torch's AdamW, as is eps
_EPS = 1e-8

_MAX_WEIGHTS = 100_000
"""Weights of one head (K x D) up to which heads are trained together.

Training together saves the fixed cost of each operation, which dominates for small heads. For large heads, the AdamW
below is slower than torch's. CPU time one by one over together, for 20 heads, one thread and batches of 32: 11x for
1280 -> 2 classes, 10x for 512 -> 10, 2.4x for 1280 -> 30, 1.4x for 512 -> 100, 0.9x for 1280 -> 100, 0.6x for
1280 -> 300. The break-even is at about the same size with 2, 5 and 50 heads. A stopwatch would choose differently from
run to run, and so change the bits.
"""

_Group = tuple[bool, torch.Size]  # whether the heads standardise, and the shape of their weights


def ignore_progress(epochs: int) -> None:
    """Do nothing; the default progress callback."""


class HeadOptions(NamedTuple):
    """The optimizer options of one head."""

    lr: float
    weight_decay: float


class Training(NamedTuple):
    """The features, batches and loss that all heads are trained with."""

    features: Tensor
    """(N, D), or (N, C, h, w) for heads on the spatial map."""
    target: Tensor
    """Class numbers (N,)."""
    batches: Callable[[int], Iterator[Tensor]]
    """Returns the sample indices of each batch of an epoch."""
    epochs: int
    loss: Loss
    seed: int = 0
    """Seed of dropout and other random numbers of the heads; each step draws as the same step of a fit."""

    def steps(self, heads: int = 1, on_progress: ProgressCallback = ignore_progress) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of all epochs.

        Args:
            heads: Number of heads that are trained on each batch.
            on_progress: Called after each epoch.
        """
        for epoch in range(self.epochs):
            for index in self.batches(epoch):
                yield self.features[index], self.target[index]
            on_progress(heads)

    def total_steps(self) -> int:
        """Return the number of optimizer steps."""
        return self.epochs * sum(1 for _ in self.batches(0))


def train_heads(
    heads: Sequence[nn.Module],
    options: Sequence[HeadOptions],
    training: Training,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Train heads, each with its own options, by AdamW with warm-up and cosine; small linear heads together.

    Args:
        heads: The heads, trained in place.
        options: The options of each head.
        training: The features, batches and loss.
        on_progress: Called after each epoch.
    """
    groups: dict[_Group | None, list[int]] = {}
    for number, head in enumerate(heads):
        groups.setdefault(_group_of(head), []).append(number)
    for group, numbers in groups.items():
        members, member_options = [heads[n] for n in numbers], [options[n] for n in numbers]
        if group is not None and len(members) > 1 and _loss_can_be_batched(training, num_classes=group[1][0]):
            train_heads_together(members, member_options, training, on_progress)  # type: ignore[arg-type]  # all linear
        else:
            for head, own in zip(members, member_options, strict=True):
                train_head(head, own, training, on_progress)


def train_head(
    head: nn.Module,
    options: HeadOptions,
    training: Training,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Train one head.

    Args:
        head: The head, trained in place.
        options: Its options.
        training: The features, batches and loss.
        on_progress: Called after each epoch.
    """
    groups = optim.parameter_groups(head.named_parameters(), name="head", lr=options.lr)
    optimizer = AdamW(groups, weight_decay=options.weight_decay)
    total_steps = training.total_steps()
    schedule = optim.warmup_cosine(optimizer, total_steps)
    head.train()
    with seeded(training.seed):
        for step, (features, target) in enumerate(training.steps(1, on_progress)):
            seed_torch(training.seed, "step", step, step % (total_steps // training.epochs), 0)
            loss = training.loss(head(features), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            schedule.step()
    head.eval()


def train_heads_together(
    heads: Sequence[LinearHead],
    options: Sequence[HeadOptions],
    training: Training,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Train linear heads of one shape: one matrix product computes the logits of all of them.

    Args:
        heads: The heads, trained in place; all of them standardise or none does, and none uses dropout.
        options: The options of each head.
        training: The features, batches and loss.
        on_progress: Called after each epoch.
    """
    count = len(heads)
    standardize = heads[0].standardize.train()
    parameters = [
        torch.stack([head.linear.weight.detach() for head in heads]),  # (heads, K, D)
        torch.stack([head.linear.bias.detach() for head in heads]),  # (heads, K)
    ]
    base_lr = training.features.new_tensor([own.lr for own in options])
    decay = training.features.new_tensor([own.weight_decay for own in options])
    first_moments, second_moments = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    batched_loss = torch.vmap(training.loss, in_dims=(1, None))
    total_steps = training.total_steps()
    for step, (features, target) in enumerate(training.steps(count, on_progress)):
        for parameter in parameters:
            parameter.requires_grad_(True)
        weight, bias = parameters
        logits = (standardize(features) @ weight.flatten(0, 1).T).view(len(features), count, -1) + bias
        gradients = torch.autograd.grad(batched_loss(logits, target).sum(), parameters)
        lr = base_lr * optim.warmup_cosine_factor(step, total_steps)
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                parameter.requires_grad_(False)
                own_lr = lr.view(-1, *[1] * (parameter.ndim - 1))
                if parameter.ndim > 2:  # biases are not decayed
                    parameter.mul_(1 - own_lr * decay.view_as(own_lr))
                first_moments[i].lerp_(gradient, 1 - _BETAS[0])
                second_moments[i].mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
                root = (second_moments[i].sqrt() / (1 - _BETAS[1] ** (step + 1)) ** 0.5).add_(_EPS)
                parameter.sub_(own_lr / (1 - _BETAS[0] ** (step + 1)) * first_moments[i] / root)
    for number, head in enumerate(heads):
        with torch.no_grad():
            head.linear.weight.copy_(parameters[0][number])
            head.linear.bias.copy_(parameters[1][number])
        head.standardize.load_state_dict(standardize.state_dict())
        head.eval()


def _group_of(head: nn.Module) -> _Group | None:
    """Return the group of heads that a head can be trained together with; None for a head that is trained alone."""
    if type(head).forward is not LinearHead.forward or not isinstance(head, LinearHead) or head.dropout.p:
        return None
    if head.linear.weight.numel() > _MAX_WEIGHTS:
        return None
    return isinstance(head.standardize, Standardize), head.linear.weight.shape


def _loss_can_be_batched(training: Training, *, num_classes: int) -> bool:
    """Try the loss on the first batch: vmap refuses a loss that branches on values or draws random numbers.

    The operations of the loss decide, not the values, so the answer is the same in equal runs and on all ranks.
    https://docs.pytorch.org/docs/stable/func.ux_limitations.html
    """
    target = training.target[next(training.batches(0))]
    logits = training.features.new_zeros(len(target), 2, num_classes, requires_grad=True)
    try:
        losses = torch.vmap(training.loss, in_dims=(1, None))(logits, target)
        torch.autograd.grad(losses.sum(), logits)
    except RuntimeError:
        return False
    return True
