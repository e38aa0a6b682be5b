"""Heads: they map the pooled features of a backbone, or its spatial map, to logits."""

from tl_lightning.heads.closed_form import ClassMeanHead, ClosedFormHead, LogisticRegressionHead, NearestNeighbourHead
from tl_lightning.heads.neural import (
    ConvHead,
    CosineHead,
    HeadCallable,
    LinearHead,
    MapHead,
    MLPHead,
    check_head_factory,
    resize_last_linear,
)
from tl_lightning.heads.standardize import Standardize

__all__ = [
    "ClassMeanHead",
    "ClosedFormHead",
    "ConvHead",
    "CosineHead",
    "HeadCallable",
    "LinearHead",
    "LogisticRegressionHead",
    "MLPHead",
    "MapHead",
    "NearestNeighbourHead",
    "Standardize",
    "check_head_factory",
    "resize_last_linear",
]
