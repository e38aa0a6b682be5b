"""Features on disk: what is frozen is computed once."""

from tl_lightning.features._manifest import StaleStoreError
from tl_lightning.features._shards import DamagedStoreError
from tl_lightning.features.cache_key import CacheKey, cache_key_of, check_dtype, content_key, content_keys
from tl_lightning.features.extraction import ExtractionStats, extract, folder_for
from tl_lightning.features.response import like
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
    "content_key",
    "content_keys",
    "extract",
    "folder_for",
    "like",
]
