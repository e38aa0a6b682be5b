"""Build the classifier and the ``fit`` configuration of a candidate."""

import functools
from typing import Any

from torch.optim import AdamW

from tl_lightning.backbones import TruncatedBackbone
from tl_lightning.freezing import HEAD
from tl_lightning.modules import CustomHeadClassifier, TransferClassifier
from tl_lightning.sweep.candidates import Candidate, truncate_backbone
from tl_lightning.utils.serialization import as_factory, class_path, to_config

SWEEP_OPTIONS = ("lr", "weight_decay", "heads", "boundaries", "folds")
"""Options of the command ``sweep`` that ``fit`` does not have."""


def build_classifier(model: TransferClassifier, candidate: Candidate, *, other_head: bool) -> TransferClassifier:
    """Build the classifier of a candidate, with an untrained head.

    Args:
        model: The classifier whose head is replaced.
        candidate: The head, its options and the boundary.
        other_head: Whether the head was chosen by the user, instead of by the model.
    """
    positional, named = model.init_args
    named = named | {
        "backbone": truncate_backbone(model.backbone, candidate.boundary),
        "lr": candidate.options.lr,
        "optimizer": functools.partial(AdamW, weight_decay=candidate.options.weight_decay),
    }
    cls: Any = type(model)
    if other_head:
        cls = cls if isinstance(model, CustomHeadClassifier) else CustomHeadClassifier
        named["head"] = candidate.head
    classifier: TransferClassifier = cls(*positional, **named)
    return classifier


def to_fit_config(sweep_config: dict[str, Any], classifier: TransferClassifier, candidate: Candidate) -> dict[str, Any]:
    """Return the configuration of a fit that trains the winner again.

    Args:
        sweep_config: The configuration of the sweep.
        classifier: The classifier of the winner.
        candidate: The winner.
    """
    arguments = dict(sweep_config["model"].get("init_args") or {})
    arguments["lr"] = candidate.options.lr
    decay = {"weight_decay": candidate.options.weight_decay}
    arguments["optimizer"] = {"class_path": class_path(AdamW), "init_args": decay}
    factory = as_factory(candidate.head)
    if sweep_config["heads"] is not None and factory is not None:
        head = to_config(factory)
        arguments["head"] = {key: head[key] for key in ("class_path", "init_args")}
    config = {key: value for key, value in sweep_config.items() if key not in SWEEP_OPTIONS}
    config["model"] = {"class_path": class_path(type(classifier)), "init_args": arguments}
    if candidate.boundary != HEAD:
        truncated = {"backbone": sweep_config["backbone"], "before": candidate.boundary}
        config["backbone"] = {"class_path": class_path(TruncatedBackbone), "init_args": truncated}
    return config
