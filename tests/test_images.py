"""Image files of every mode and format read as the same pixels as their plain RGB twins."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.doubles import TINY, TinyBackbone
from tl_lightning.images import ImageError, check_header, read_content, read_image
from tl_lightning.modules import LinearProbe
from tl_lightning.transforms import eval_transform

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (30, 26, 3)).astype(np.uint8))
GREY = RGB.convert("L")
GREY_RGB = GREY.convert("RGB")
ALPHA = Image.fromarray(RNG.integers(0, 256, (30, 26)).astype(np.uint8))
EXIF_ROTATED = 6  # the camera was turned by 90 degrees


def wide(scale: int) -> Image.Image:
    return Image.fromarray((np.asarray(GREY).astype(np.uint16)) * scale)


def on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    layer = image.convert("RGB")
    layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


def palette(transparent: bool) -> tuple[Image.Image, Image.Image]:
    indexed = RGB.quantize(16)
    twin = indexed.convert("RGB")
    if transparent:
        mask = np.asarray(indexed) == 3
        pixels = np.asarray(twin).copy()
        pixels[mask] = 255
        twin = Image.fromarray(pixels)
        indexed.info["transparency"] = 3
    return indexed, twin


def rotated() -> tuple[Image.Image, Image.Image]:
    turned = RGB.copy()
    turned.getexif()[0x0112] = EXIF_ROTATED
    return turned, RGB.transpose(Image.Transpose.ROTATE_270)


def colour_key() -> tuple[Image.Image, Image.Image]:
    key = RGB.getpixel((4, 5))
    pixels = np.asarray(RGB).copy()
    pixels[(pixels == np.array(key)).all(-1)] = 255
    keyed = RGB.copy()
    keyed.info["transparency"] = key
    return keyed, Image.fromarray(pixels)


def cmyk() -> tuple[Image.Image, Image.Image]:
    return RGB.convert("CMYK"), RGB


CASES: dict[str, tuple[str, Callable[[], tuple[Image.Image, Image.Image]]]] = {
    "rgb": ("png", lambda: (RGB, RGB)),
    "grey": ("png", lambda: (GREY, GREY_RGB)),
    "one bit": ("png", lambda: (RGB.convert("1"), RGB.convert("1").convert("RGB"))),
    "grey of 16 bits": ("png", lambda: (wide(257), GREY_RGB)),
    "grey of 16 bits, tiff": ("tiff", lambda: (wide(257), GREY_RGB)),
    "grey of 32 bits": ("tiff", lambda: (wide(257).convert("I"), GREY_RGB)),
    "rgba": ("png", lambda: (with_alpha(RGB, ALPHA), on_white(RGB, ALPHA))),
    "grey with alpha": ("png", lambda: (with_alpha(GREY, ALPHA), on_white(GREY, ALPHA))),
    "rgba, webp": ("webp", lambda: (with_alpha(RGB, Image.new("L", RGB.size, 255)), RGB)),
    "palette": ("png", lambda: palette(transparent=False)),
    "palette with transparency": ("png", lambda: palette(transparent=True)),
    "gif": ("gif", lambda: palette(transparent=False)),
    "transparent colour": ("png", colour_key),
    "cmyk": ("tiff", cmyk),
    "rotated": ("png", rotated),
    "rotated tiff": ("tiff", rotated),
}


def save(image: Image.Image, path: Path) -> Path:
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    if path.suffix == ".png" and "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(path, exif=image.getexif(), **options)
    return path


@pytest.mark.parametrize("case", CASES)
def test_image_gives_the_probabilities_of_its_rgb_twin_bit_for_bit(case: str, tmp_path: Path) -> None:
    suffix, make = CASES[case]
    image, twin = make()
    pictures = [read_image(save(image, tmp_path / f"image.{suffix}")), read_image(save(twin, tmp_path / "twin.png"))]
    assert pictures[0].shape == pictures[1].shape
    assert torch.equal(*pictures)
    torch.manual_seed(0)
    model = LinearProbe(TinyBackbone(), num_classes=3).eval()
    with torch.no_grad():
        first, second = (model(eval_transform(TINY)(picture)[None]).softmax(-1) for picture in pictures)
    assert torch.equal(first, second)


def test_cmyk_jpeg_is_its_twin_up_to_compression(tmp_path: Path) -> None:
    smooth = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], (32, 1, 3)))
    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    difference = read_image(tmp_path / "cmyk.jpg").int() - torch.from_numpy(np.array(smooth)).permute(2, 0, 1).int()
    assert difference.abs().max() <= 6


def test_sixteen_bits_are_scaled_instead_of_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128, 129, 40000, 65535]], dtype=np.uint16)).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png")[0, 0].tolist() == [0, 0, 1, 156, 255]


def test_background_fills_transparent_parts(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert torch.unique(read_image(tmp_path / "clear.png")).tolist() == [255]
    assert read_image(tmp_path / "clear.png", (10, 20, 30))[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty; copy the file again"),
        (b"not an image", "it is not an image, "),
        (b"\x89PNG\r\n\x1a\n broken", "it is not an image, "),
    ],
)
def test_unreadable_file_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    message = rf"cannot read the image '.*bad\.png': {reason}.*or remove it$"
    for given in (None, content):
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / "bad.png", content=given)
    with pytest.raises(ImageError, match=message):
        check_header(tmp_path / "bad.png")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A program that reads a FIFO waits until another one writes to it."""
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((tmp_path / "pipe.png", "a FIFO"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        for read in (read_image, read_content, check_header):
            with pytest.raises(ImageError, match=f"cannot read the image '{path}': it is {kind}, not a regular file"):
                read(path)


def test_header_of_every_readable_image_is_accepted(tmp_path: Path) -> None:
    for suffix, make in CASES.values():
        check_header(save(make()[0], tmp_path / f"image.{suffix}"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read the image '.*gone\.png': No such file or directory$"):
        read_image(tmp_path / "gone.png")


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = save(RGB, tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="half"):
        read_image(tmp_path / "half.png")


def test_floating_point_image_is_refused_and_another_format_named(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
    for read in (read_image, check_header):
        with pytest.raises(ImageError, match="save it with 8 or 16 bits"):
            read(tmp_path / "float.tiff")
