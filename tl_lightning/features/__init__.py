"""Features on disk: what is frozen is computed once."""

from tl_lightning.features.extraction import Extracted, extract, folder_for
from tl_lightning.features.files import StaleStoreError
from tl_lightning.features.recipe import Recipe, check_dtype, content_key, content_keys, recipe_of
from tl_lightning.features.response import like
from tl_lightning.features.rows import StoredRows
from tl_lightning.features.shards import DamagedStoreError
from tl_lightning.features.store import FeatureStore

__all__ = [
    "DamagedStoreError",
    "Extracted",
    "FeatureStore",
    "Recipe",
    "StaleStoreError",
    "StoredRows",
    "check_dtype",
    "content_key",
    "content_keys",
    "extract",
    "folder_for",
    "like",
    "recipe_of",
]
