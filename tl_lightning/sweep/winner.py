"""The classifier and the ``fit`` configuration of a sweep's winner."""

import functools
from typing import Any

from torch.optim import AdamW

from tl_lightning.backbones import TruncatedBackbone
from tl_lightning.freezing import HEAD
from tl_lightning.modules import CustomHeadClassifier, TransferClassifier
from tl_lightning.sweep.candidates import Candidate, ending
from tl_lightning.utils.serialization import as_factory, class_path, to_config

OPTIONS = ("lr", "weight_decay", "heads", "boundaries", "folds")
"""Of a sweep, which a fit has not."""


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


def configuration_of(sweep_result: dict[str, Any], made: TransferClassifier, candidate: Candidate) -> dict[str, Any]:
    """Return the configuration of a fit that trains what was chosen.

    Args:
        sweep_result: The configuration of the sweep.
        made: The classifier that was chosen.
        candidate: What was chosen.
    """
    configured = sweep_result["model"]
    arguments = dict(configured.get("init_args") or {})
    arguments["lr"] = candidate.rates.lr
    decay = {"weight_decay": candidate.rates.weight_decay}
    arguments["optimizer"] = {"class_path": class_path(AdamW), "init_args": decay}
    factory = as_factory(candidate.head)
    if sweep_result["heads"] is not None and factory is not None:
        head = to_config(factory)
        arguments["head"] = {key: head[key] for key in ("class_path", "init_args")}
    fit = {key: value for key, value in sweep_result.items() if key not in OPTIONS}
    fit["model"] = {"class_path": class_path(type(made)), "init_args": arguments}
    if candidate.before != HEAD:
        early = {"backbone": sweep_result["backbone"], "before": candidate.before}
        fit["backbone"] = {"class_path": class_path(TruncatedBackbone), "init_args": early}
    return fit
