"""Heads: from a backbone's pooled features, or its spatial map, to class scores."""

from tl_lightning.heads.fitted import ClassMeanHead, FittedHead, LogisticRegressionHead, NearestNeighbourHead
from tl_lightning.heads.trained import (
    ConvHead,
    CosineHead,
    HeadCallable,
    LinearHead,
    MapHead,
    MLPHead,
    Standardize,
    check_maker,
    resize_last_linear,
)

__all__ = [
    "ClassMeanHead",
    "ConvHead",
    "CosineHead",
    "FittedHead",
    "HeadCallable",
    "LinearHead",
    "LogisticRegressionHead",
    "MLPHead",
    "MapHead",
    "NearestNeighbourHead",
    "Standardize",
    "check_maker",
    "resize_last_linear",
]
