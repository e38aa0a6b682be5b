"""Find the images that cannot be read before a run starts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from tl_lightning.images import ImageError, check_header, short_reason
from tl_lightning.utils.distributed import all_gather_object, rank_and_world_size
from tl_lightning.utils.messages import listed

_THREADS = 16  # on a network file system, most of the time is spent waiting


def check_images(root: Path, files: Sequence[str]) -> None:
    """Check the headers of image files in parallel; call it on all ranks, which divide the files among them.

    Args:
        root: The folder that holds the files.
        files: Paths relative to ``root``.

    Raises:
        ImageError: Some files are missing, empty or no images; the message counts them and names the first ones.
    """
    Image.init()  # the threads would run it, and one could see a list of formats that another has half filled
    rank, world_size = rank_and_world_size()
    with ThreadPoolExecutor(_THREADS) as threads:
        reasons = list(threads.map(_reason, [root / file for file in files[rank::world_size]]))
    own = {file: reason for file, reason in zip(files[rank::world_size], reasons, strict=True) if reason}
    bad = {file: reason for share in all_gather_object(own) for file, reason in share.items()}
    if bad:
        described = listed([f"{file!r} ({bad[file]})" for file in sorted(bad)])
        raise ImageError(
            f"{len(bad):,} of {len(files):,} images in {str(root)!r} cannot be read: {described}; repair or remove them"
        )


def _reason(path: Path) -> str | None:
    try:
        check_header(path)
    except ImageError as error:
        return short_reason(error, path)
    return None
