"""What a sweep tries, and the classifier that it ends with."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW

from tl_lightning.backbones import Backbone, TracedBackbone, TruncatedBackbone
from tl_lightning.features.activations import prefix_of
from tl_lightning.freezing import HEAD
from tl_lightning.heads import FittedHead, HeadCallable, LinearHead, check_maker
from tl_lightning.makeup import as_factory, class_path, describe
from tl_lightning.messages import unknown
from tl_lightning.modules import CustomHeadClassifier, LinearProbe, TransferClassifier
from tl_lightning.sweep.candidate import Candidate
from tl_lightning.sweep.training import Rates

OPTIONS = ("lr", "weight_decay", "heads", "boundaries", "folds")
"""Of a sweep, which a fit has not."""

_OF_A_STEP = ("forward", "forward_from", "features_from", "training_step", "training_loss", "configure_optimizers")


def candidates_of(
    model: TransferClassifier,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    heads: Sequence[HeadCallable] | None = None,
    boundaries: Sequence[str] | None = None,
) -> list[Candidate]:
    """Combine boundaries, heads, rates and weight decays.

    Args:
        model: The classifier whose head is varied.
        lr: Learning rates.
        weight_decay: Weight decays.
        heads: Classes of heads; None takes that of the model.
        boundaries: Stages before which the network ends, ``head`` for its end; None takes its end alone.

    Raises:
        ValueError: The model trains more than a head, or not by steps, has an optimizer or a schedule of its own, or takes no
            other head; there is nothing to try, or a rate, decay or boundary that is none; or a head is a lambda, or solved
            for at once.
    """
    name = type(model).__name__
    if model.staging.trainable or not model.automatic_optimization:
        raise ValueError(
            f"sweep trains many heads on features that do not move, and {name} is trained otherwise: use LinearProbe or "
            "CustomHeadClassifier"
        )
    own = [method for method in _OF_A_STEP if getattr(type(model), method) is not getattr(_plain(model), method)]
    if own:
        raise ValueError(
            f"{name} has its own {', '.join(own)}, which sweep would pass over: it trains heads on features by compute_loss"
        )
    if model.optimizer is not None or model.scheduler is not None:
        raise ValueError(
            "sweep trains by AdamW, with a warm-up and a cosine, at the rates and weight decays that are compared: leave "
            "optimizer and scheduler out of the model"
        )
    missing = [argument for argument in ("backbone", "lr", "optimizer") if argument not in model.init_args[1]]
    if missing:
        raise ValueError(f"{name} takes no {' and no '.join(missing)}, so what is found could not be written down")
    if heads is not None and type(model) is not LinearProbe and not isinstance(model, CustomHeadClassifier):
        raise ValueError(f"{name} has a head of its own: leave heads out, or derive it from CustomHeadClassifier")
    ends = [HEAD] if boundaries is None else list(dict.fromkeys(boundaries))
    if not lr or not weight_decay or not ends or (heads is not None and not heads):
        raise ValueError("there is nothing to compare: give at least one lr, weight_decay, head and boundary")
    if not (all(0 < rate < math.inf for rate in lr) and all(0 <= decay < math.inf for decay in weight_decay)):
        raise ValueError(
            f"lr is {list(lr)} and weight_decay {list(weight_decay)}; rates are above 0, decays at least 0, all finite"
        )
    for head in heads or ():
        _check(head, model)
    tried = [_own_head(model)] if heads is None else heads
    return [
        Candidate(head, Rates(*rates), before, size)
        for before, size in {before: _size(model.backbone, before) for before in ends}.items()
        for head in tried
        for rates in itertools.product(lr, weight_decay)
    ]


def _plain(model: TransferClassifier) -> type[TransferClassifier]:
    return next(cls for cls in (LinearProbe, CustomHeadClassifier, TransferClassifier) if isinstance(model, cls))


def ending(backbone: Backbone, before: str) -> Backbone:
    """Return the part of a network before a stage; all of it for ``head``.

    Raises:
        ValueError: There is no such stage, or the network cannot be cut.
    """
    if before == HEAD:
        return backbone
    if before not in backbone.stages[1:]:
        raise ValueError(unknown("boundary", before, [*backbone.stages[1:], HEAD], of=type(backbone).__name__))
    if not isinstance(backbone, TracedBackbone):
        raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
            f"{type(backbone).__name__} is no TracedBackbone, so it cannot end before {before!r}: leave boundaries out"
        )
    return TruncatedBackbone(backbone, before)


def _size(backbone: Backbone, before: str) -> int:
    ending(backbone, before)  # raises where it cannot end
    return sum(parameter.numel() for parameter in prefix_of(backbone, before).parameters())


def _check(head: HeadCallable, model: TransferClassifier) -> None:
    """Refuse now what cannot be made, what no checkpoint could bring back, or what is not trained by steps."""
    check_maker(head)
    describe(head)
    factory = as_factory(head)
    if factory is not None and issubclass(factory.func, FittedHead):  # type: ignore[arg-type]  # a class
        raise ValueError(
            f"{factory.func.__name__} is solved for at once, without a rate or a weight decay: use it with "
            "FeatureCacheClassifier and fit"
        )
    try:
        head(model.backbone.feature_dim, model.num_classes)
    except (TypeError, ValueError) as error:
        name = factory.func.__name__ if factory is not None else str(head)
        raise ValueError(f"{name} cannot be made for {model.num_classes} classes: {error}") from error


def _own_head(model: TransferClassifier) -> HeadCallable:
    if isinstance(model, CustomHeadClassifier):
        return model.make_head
    return functools.partial(LinearHead, standardize=True) if type(model) is LinearProbe else model.build_head


def classifier_of(model: TransferClassifier, candidate: Candidate, *, other_head: bool) -> TransferClassifier:
    """Make the classifier that a candidate stands for, with an untrained head.

    Args:
        model: The classifier whose head is varied.
        candidate: What is tried.
        other_head: Whether the head is none of the model's own.
    """
    positional, named = model.init_args
    named = named | {
        "backbone": ending(model.backbone, candidate.before),
        "lr": candidate.rates.lr,
        "optimizer": functools.partial(AdamW, weight_decay=candidate.rates.weight_decay),
    }
    cls: Any = type(model)
    if other_head:
        cls = cls if isinstance(model, CustomHeadClassifier) else CustomHeadClassifier
        named["head"] = candidate.head
    made: TransferClassifier = cls(*positional, **named)
    return made


def configuration_of(swept: dict[str, Any], made: TransferClassifier, candidate: Candidate) -> dict[str, Any]:
    """Return the configuration of a fit that trains what was chosen.

    Args:
        swept: The configuration of the sweep.
        made: The classifier that was chosen.
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
    fit = {key: value for key, value in swept.items() if key not in OPTIONS}
    fit["model"] = {"class_path": class_path(type(made)), "init_args": arguments}
    if candidate.before != HEAD:
        early = {"backbone": swept["backbone"], "before": candidate.before}
        fit["backbone"] = {"class_path": class_path(TruncatedBackbone), "init_args": early}
    return fit
