"""The candidates of a sweep: a head, its options, and the stage before which the network is cut."""

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

_STEP_METHODS = ("forward", "forward_from", "features_from", "training_step", "training_loss", "configure_optimizers")


class HeadInput(NamedTuple):
    """The features that a head takes."""

    boundary: str = HEAD
    """The stage before which the network is cut; ``head`` for the whole network."""
    representation: str = HEAD
    """``head`` for pooled features, ``map`` for the spatial map."""


class Candidate(NamedTuple):
    """A head with its options, on the network or on its first stages."""

    head: HeadCallable
    options: HeadOptions
    boundary: str = HEAD
    """The stage before which the network is cut; ``head`` for the whole network."""
    backbone_size: int = 0
    """Number of parameters of the network before the boundary."""

    @property
    def head_input(self) -> HeadInput:
        """The features that the head takes."""
        factory = as_factory(self.head)
        on_map = factory is not None and issubclass(factory.func, MapHead)  # type: ignore[arg-type]  # a class
        return HeadInput(self.boundary, MAP if on_map else HEAD)

    @property
    def name(self) -> str:
        """The class of the head, with all arguments that differ from their defaults."""
        factory = as_factory(self.head)
        if factory is None:
            return getattr(self.head, "__name__", type(self.head).__name__)
        defaults = inspect.signature(factory.func).parameters
        given = [
            f"{key}={value}"
            for key, value in factory.keywords.items()
            if key not in defaults or value != defaults[key].default
        ]
        return f"{factory.func.__name__}({', '.join(given)})"


def build_candidates(
    model: TransferClassifier,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    heads: Sequence[HeadCallable] | None = None,
    boundaries: Sequence[str] | None = None,
) -> list[Candidate]:
    """Combine boundaries, heads, learning rates and weight decays.

    Args:
        model: The classifier whose head is replaced.
        lr: Learning rates.
        weight_decay: Weight decays.
        heads: Classes of heads; None takes the head of the model.
        boundaries: Stages before which the network is cut, ``head`` for the whole network; None takes the whole one.

    Raises:
        ValueError: The model is not a classifier whose head alone is trained by the default step and optimizer; or a
            list is empty; or a learning rate, weight decay, boundary or head is invalid.
    """
    _check_model(model, heads)
    cuts = [HEAD] if boundaries is None else list(dict.fromkeys(boundaries))
    if not lr or not weight_decay or not cuts or (heads is not None and not heads):
        raise ValueError("there is nothing to compare: give at least one lr, weight_decay, head and boundary")
    if not (all(0 < rate < math.inf for rate in lr) and all(0 <= decay < math.inf for decay in weight_decay)):
        raise ValueError(
            f"lr is {list(lr)} and weight_decay {list(weight_decay)}; rates are above 0, decays at least 0, all finite"
        )
    for head in heads or ():
        _check_head(head, model)
    sizes = {boundary: _count_parameters(model.backbone, boundary) for boundary in cuts}
    return [
        Candidate(head, HeadOptions(*options), boundary, size)
        for boundary, size in sizes.items()
        for head in ([_head_of(model)] if heads is None else heads)
        for options in itertools.product(lr, weight_decay)
    ]


def truncate_backbone(backbone: Backbone, boundary: str) -> Backbone:
    """Return the part of a network before a stage; the whole network for ``head``.

    Args:
        backbone: The whole network.
        boundary: The stage, or ``head``.

    Raises:
        ValueError: There is no such stage, or the network cannot be cut.
    """
    if boundary == HEAD:
        return backbone
    if boundary not in backbone.stages[1:]:
        raise ValueError(unknown("boundary", boundary, [*backbone.stages[1:], HEAD], of=type(backbone).__name__))
    if not isinstance(backbone, TracedBackbone):
        raise ValueError(  # noqa: TRY004 - a wrong choice of the user
            f"{type(backbone).__name__} is no TracedBackbone, so it cannot end before {boundary!r}: leave boundaries "
            "out"
        )
    return TruncatedBackbone(backbone, boundary)


def _count_parameters(backbone: Backbone, boundary: str) -> int:
    truncate_backbone(backbone, boundary)  # raises if the network cannot be cut there
    return sum(parameter.numel() for parameter in prefix_of(backbone, boundary).parameters())


def _check_model(model: TransferClassifier, heads: Sequence[HeadCallable] | None) -> None:
    """Refuse a classifier whose fit would differ from the training of heads in a sweep."""
    name = type(model).__name__
    if model.freeze_policy.unfreezable or not model.automatic_optimization:
        raise ValueError(
            f"sweep trains many heads on features of a frozen network, and {name} is trained differently: use "
            "LinearProbe or CustomHeadClassifier"
        )
    library_class = next(
        cls for cls in (LinearProbe, CustomHeadClassifier, TransferClassifier) if isinstance(model, cls)
    )
    overridden = [each for each in _STEP_METHODS if getattr(type(model), each) is not getattr(library_class, each)]
    if overridden:
        raise ValueError(
            f"{name} overrides {', '.join(overridden)}, which sweep would not call: it trains heads on features by "
            "compute_loss. Override compute_loss instead, or use fit"
        )
    if model.optimizer is not None or model.scheduler is not None:
        raise ValueError(
            "sweep trains by AdamW with warm-up and cosine, at the learning rates and weight decays that it compares: "
            "leave optimizer and scheduler out of the model"
        )
    missing = [argument for argument in ("backbone", "lr", "optimizer") if argument not in model.init_args[1]]
    if missing:
        raise ValueError(
            f"{name} takes no {' and no '.join(missing)}, so no configuration could hold the winner: add the argument "
            "to its __init__"
        )
    if heads is not None and type(model) is not LinearProbe and not isinstance(model, CustomHeadClassifier):
        raise ValueError(f"{name} has a head of its own: leave heads out, or derive it from CustomHeadClassifier")


def _check_head(head: HeadCallable, model: TransferClassifier) -> None:
    """Refuse a head that cannot be built, written into a checkpoint, or trained by steps."""
    check_head_factory(head)
    to_config(head)
    factory = as_factory(head)
    if factory is not None and issubclass(factory.func, ClosedFormHead):  # type: ignore[arg-type]  # a class
        raise ValueError(
            f"{factory.func.__name__} is fitted to all features at once, without a learning rate or a weight decay: "
            "use it with FeatureCacheClassifier and fit"
        )
    try:
        head(model.backbone.feature_dim, model.num_classes)
    except (TypeError, ValueError) as error:
        name = factory.func.__name__ if factory is not None else str(head)
        raise ValueError(f"{name} cannot be built for {model.num_classes} classes: {error}") from error


def _head_of(model: TransferClassifier) -> HeadCallable:
    """Return the head factory of the model."""
    if isinstance(model, CustomHeadClassifier):
        return model.head_factory
    return functools.partial(LinearHead, standardize=True) if type(model) is LinearProbe else model.build_head
