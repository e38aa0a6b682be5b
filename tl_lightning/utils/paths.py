"""Paths: as a user types them, and of the cache."""

import os
from pathlib import Path


def short_path(path: str | Path) -> str:
    """Return a path as it is typed from the current folder, if it lies in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)


def cache_folder() -> Path:
    """Return the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tl_lightning"
