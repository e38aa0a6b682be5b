"""Cache the output of frozen stages on disk, so that it is computed once."""

from tl_lightning.features._determinism import patterns
from tl_lightning.features._manifest import StaleStoreError
from tl_lightning.features._messages import describe_boundary
from tl_lightning.features._shards import DamagedStoreError
from tl_lightning.features.activations import reference_tensor
from tl_lightning.features.cache_key import CacheKey, cache_key_of, check_dtype, content_key, content_keys
from tl_lightning.features.extraction import ExtractionStats, check_ranks, extract
from tl_lightning.features.rows import FeatureRows
from tl_lightning.features.store import FeatureStore

__all__ = [
    "CacheKey",
    "DamagedStoreError",
    "ExtractionStats",
    "FeatureRows",
    "FeatureStore",
    "StaleStoreError",
    "cache_key_of",
    "check_dtype",
    "check_ranks",
    "content_key",
    "content_keys",
    "describe_boundary",
    "extract",
    "patterns",
    "reference_tensor",
]
