"""What a sweep tries, and the classifier that it ends with."""

import functools
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from tl_lightning.backbones import Backbone, TracedBackbone, TruncatedBackbone
from tl_lightning.features.activations import prefix_of
from tl_lightning.freezing import HEAD, MAP
from tl_lightning.heads import ClosedFormHead, HeadCallable, LinearHead, MapHead, check_head_factory
from tl_lightning.modules import CustomHeadClassifier, LinearProbe, TransferClassifier
from tl_lightning.sweep.training import HeadOptions
from tl_lightning.utils.messages import unknown
from tl_lightning.utils.serialization import as_factory, to_config

_OF_A_STEP = ("forward", "forward_from", "features_from", "training_step", "training_loss", "configure_optimizers")


Source = tuple[str, str]
"""The stage before which a network ends, ``head`` for its end; and ``head`` for its pooled features, ``map`` for its map."""

WHOLE: Source = (HEAD, HEAD)
"""The pooled features of a whole network."""


class Candidate(NamedTuple):
    """What is tried."""

    head: HeadCallable
    rates: HeadOptions
    before: str = HEAD
    """The stage before which the network ends; ``head`` for all of it."""
    network_size: int = 0
    """Number of the network's parameters up to there."""

    @property
    def takes(self) -> Source:
        """What the head takes."""
        factory = as_factory(self.head)
        on_map = factory is not None and issubclass(factory.func, MapHead)  # type: ignore[arg-type]  # a class
        return self.before, MAP if on_map else HEAD

    @property
    def name(self) -> str:
        """The head's class, and the arguments that are not its defaults."""
        factory = as_factory(self.head)
        if factory is None:
            return getattr(self.head, "__name__", type(self.head).__name__)
        defaults = inspect.signature(factory.func).parameters
        own = [
            f"{key}={value}"
            for key, value in factory.keywords.items()
            if key not in defaults or value != defaults[key].default
        ]
        return f"{factory.func.__name__}({', '.join(own)})"


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
    if model.freeze_policy.unfreezable or not model.automatic_optimization:
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
        Candidate(head, HeadOptions(*rates), before, size)
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
    check_head_factory(head)
    to_config(head)
    factory = as_factory(head)
    if factory is not None and issubclass(factory.func, ClosedFormHead):  # type: ignore[arg-type]  # a class
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
        return model.head_factory
    return functools.partial(LinearHead, standardize=True) if type(model) is LinearProbe else model.build_head
