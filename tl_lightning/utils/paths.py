"""Paths as a user types them, and the folder of the cache."""

import os
from pathlib import Path


def short_path(path: str | Path) -> str:
    """Return a path in the current folder relative to it, and any other path as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)


def cache_folder() -> Path:
    """Return this package's folder in the user's cache, whose files can be computed again at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tl_lightning"
