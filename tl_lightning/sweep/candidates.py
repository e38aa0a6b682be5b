"""What a sweep tries, and the classifier that it ends with."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW

from tl_lightning.heads import FittedHead, HeadCallable, LinearHead, check_maker
from tl_lightning.makeup import as_factory, class_path, describe
from tl_lightning.modules import CustomHeadClassifier, LinearProbe, TransferClassifier
from tl_lightning.sweep.search import Candidate
from tl_lightning.sweep.training import Rates

OPTIONS = ("lr", "weight_decay", "heads", "folds")
"""Of a sweep, which a fit has not."""


def candidates_of(
    model: TransferClassifier,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    heads: Sequence[HeadCallable] | None = None,
) -> list[Candidate]:
    """Combine heads, rates and weight decays.

    Args:
        model: The classifier whose head is varied.
        lr: Learning rates.
        weight_decay: Weight decays.
        heads: Classes of heads; None takes that of the model.

    Raises:
        ValueError: The model trains more than a head, or not by steps, has an optimizer or a schedule of its own, or takes no
            other head; there is nothing to try, or a rate or decay that is none; or a head is a lambda, or solved for at once.
    """
    name = type(model).__name__
    if model.staging.trainable or not model.automatic_optimization:
        raise ValueError(
            f"sweep trains many heads on features that do not move, and {name} is trained otherwise: use LinearProbe or "
            "CustomHeadClassifier"
        )
    if model.optimizer is not None or model.scheduler is not None:
        raise ValueError(
            "sweep trains by AdamW, with a warm-up and a cosine, at the rates and weight decays that are compared: leave "
            "optimizer and scheduler out of the model"
        )
    if "lr" not in model.init_args[1] or "optimizer" not in model.init_args[1]:
        raise ValueError(f"{name} takes no lr or no optimizer, so what is found could not be written down")
    if heads is not None and type(model) is not LinearProbe and not isinstance(model, CustomHeadClassifier):
        raise ValueError(f"{name} has a head of its own: leave heads out, or derive it from CustomHeadClassifier")
    if not lr or not weight_decay or (heads is not None and not heads):
        raise ValueError("there is nothing to compare: give at least one lr, weight_decay and head")
    if min(lr) <= 0 or min(weight_decay) < 0:
        raise ValueError(
            f"lr is {list(lr)} and weight_decay {list(weight_decay)}; rates are above 0, decays at least 0"
        )
    for head in heads or ():
        _check(head)
    tried = [_own_head(model)] if heads is None else heads
    return [Candidate(head, Rates(*rates)) for head in tried for rates in itertools.product(lr, weight_decay)]


def _check(head: HeadCallable) -> None:
    """Refuse now what no checkpoint could bring back, or what is not trained by steps."""
    check_maker(head)
    describe(head)
    factory = as_factory(head)
    if factory is not None and issubclass(factory.func, FittedHead):  # type: ignore[arg-type]  # a class
        raise ValueError(
            f"{factory.func.__name__} is solved for at once, without a rate or a weight decay: use it with "
            "FeatureCacheClassifier and fit"
        )


def _own_head(model: TransferClassifier) -> HeadCallable:
    if isinstance(model, CustomHeadClassifier):
        return model.make_head
    return functools.partial(LinearHead, standardize=True) if type(model) is LinearProbe else model.build_head


def classifier_of(
    model: TransferClassifier, candidate: Candidate, head: nn.Module, *, other_head: bool
) -> TransferClassifier:
    """Make a classifier with a head that has been trained.

    Args:
        model: The classifier whose head was varied.
        candidate: What was chosen.
        head: Its head.
        other_head: Whether the head is none of the model's own.
    """
    positional, named = model.init_args
    named = named | {
        "lr": candidate.rates.lr,
        "optimizer": functools.partial(AdamW, weight_decay=candidate.rates.weight_decay),
    }
    cls: Any = type(model)
    if other_head:
        cls = cls if isinstance(model, CustomHeadClassifier) else CustomHeadClassifier
        named["head"] = candidate.head
    made: TransferClassifier = cls(*positional, **named)
    made.head.load_state_dict(head.state_dict())
    return made


def configuration_of(swept: dict[str, Any], made: TransferClassifier, candidate: Candidate) -> dict[str, Any]:
    """Return the configuration of a fit that trains what was chosen.

    Args:
        swept: The configuration of the sweep.
        made: The classifier with the head that was chosen.
        candidate: What was chosen.
    """
    configured = swept["model"]
    arguments = dict(configured.get("init_args") or {})
    arguments["lr"] = candidate.rates.lr
    decay = {"weight_decay": candidate.rates.weight_decay}
    arguments["optimizer"] = {"class_path": class_path(AdamW), "init_args": decay}
    factory = as_factory(candidate.head)
    if swept["heads"] is not None and factory is not None:
        head = describe(factory)
        arguments["head"] = {key: head[key] for key in ("class_path", "init_args")}
    model = {"class_path": class_path(type(made)), "init_args": arguments}
    return {key: value for key, value in swept.items() if key not in OPTIONS} | {"model": model}
