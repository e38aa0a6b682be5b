"""Read an image file of any mode as the RGB image that a viewer would show."""

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

WHITE = (255, 255, 255)

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Endings, in lower case, of the files that are taken for images."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_FLOAT_PIXELS = "its pixels are floating-point numbers of unknown scale; save it with 8 or 16 bits per channel"
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(ValueError):
    """Report an image file that cannot be used; the message names the file."""


def short_reason(error: ImageError, path: Path) -> str:
    """Return why an image cannot be read, without its path and without advice."""
    return str(error).removeprefix(f"cannot read the image {str(path)!r}: ").partition("; ")[0]


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Turn an image of any mode into the RGB image that a viewer would show.

    The image is rotated as its EXIF data say, and transparency is composited on ``background``. 16 bits per channel
    become 8 by a fixed scale (65535 becomes 255). Palettes, grey and CMYK become RGB. An RGB image stays as it is, bit
    for bit.

    Args:
        image: The image; if it has several frames, the current one is used.
        background: Red, green and blue from 0 to 255.

    Raises:
        ValueError: The pixels are floating-point numbers, so their scale is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError(_FLOAT_PIXELS)
    if image.mode in _SIXTEEN_BIT_MODES:
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        narrow = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            narrow.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
        image = narrow
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    return image.convert("RGB")


def open_file(path: str | Path) -> IO[bytes]:
    """Open an image file; a FIFO or a device, on which a program may wait for ever, is refused.

    Raises:
        ImageError: The file cannot be opened, or is no regular file; the message names it.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            return Path(path).open("rb")
    except OSError as error:
        reason = error.strerror or str(error)
        if os.path.islink(path) and not os.path.exists(path):
            reason = "the link leads to nothing; remove it, or restore its target"
        raise ImageError(f"cannot read the image {str(path)!r}: {reason}") from error
    raise ImageError(
        f"cannot read the image {str(path)!r}: it is {_KINDS.get(kind, 'a special file')}, not a regular file; "
        "remove or rename it"
    )


def read_content(path: str | Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError: The file cannot be read, or is no regular file; the message names it.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise ImageError(f"cannot read the image {str(path)!r}: {error.strerror or error}") from error


def check_header(path: str | Path) -> None:
    """Check that a file is an image, as far as its first bytes tell, which takes a fraction of the time of reading it.

    Raises:
        ImageError: The file is missing or empty, is not an image, or holds floating-point pixels.
    """
    with open_file(path) as file, _opened(path, file) as image:
        if image.mode == "F":
            raise ValueError(_FLOAT_PIXELS)


@contextmanager
def _opened(path: str | Path, file: IO[bytes]) -> Iterator[Image.Image]:
    """Open an image, and name its file in all errors within the block."""
    try:
        if not file.read(1):
            raise ValueError("it is empty; copy the file again, or remove it")
        file.seek(0)
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(
            f"cannot read the image {str(path)!r}: it is not an image, or its format is unknown; convert or remove it"
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {str(path)!r}: {error}") from error


def read_image(path: str | Path, background: tuple[int, int, int] = WHITE, content: bytes | None = None) -> Tensor:
    """Read an image file.

    Args:
        path: The file.
        background: Colour behind transparent parts: red, green and blue from 0 to 255.
        content: Bytes of the file, if they have been read already.

    Returns:
        The image, uint8 of shape (3, H, W).

    Raises:
        ImageError: The file is missing, empty or no regular file, is not an image, is truncated, or holds
            floating-point pixels.
    """
    data = read_content(path) if content is None else content
    with _opened(path, io.BytesIO(data)) as image:
        rgb = to_rgb(image, background)
    return torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1).contiguous()


class ImageReader:
    """Read image files by their place in a list; unlike a closure, it can be sent to a worker process.

    Args:
        root: The folder that holds the files.
        files: Paths relative to ``root``.
        background: Colour behind transparent parts: red, green and blue from 0 to 255.
    """

    def __init__(self, root: Path, files: Sequence[str], background: tuple[int, int, int] = WHITE) -> None:
        self.root = root
        self.files = files
        self.background = background

    def __call__(self, index: int, /) -> Tensor:
        """Read an image, uint8 of shape (3, H, W); see :func:`read_image`."""
        return read_image(self.root / self.files[index], self.background)
