"""Heads: from a backbone's pooled features, or its spatial map, to class scores."""

from tl_lightning.heads.closed_form import ClassMeanHead, ClosedFormHead, LogisticRegressionHead, NearestNeighbourHead
from tl_lightning.heads.neural import (
    ConvHead,
    CosineHead,
    HeadCallable,
    LinearHead,
    MapHead,
    MLPHead,
    Standardize,
    check_head_factory,
    resize_last_linear,
)

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
