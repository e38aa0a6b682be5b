"""Download published weights once for each machine, and check the files in the cache."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import nn

from tl_lightning.backbones._weights_file import read_weights_file
from tl_lightning.backbones.weights import check_finite

_M = TypeVar("_M", bound=nn.Module)
_BLOCK = 1 << 20


def cached_file(url: str) -> Path:
    """Return the file in torch's cache to which a URL is downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def build_with_download(build: Callable[[], _M], *, name: str, weights: str, cached: Sequence[Path] = ()) -> _M:
    """Build a network whose weights may have to be downloaded, in one process of a machine at a time.

    The first process downloads the weights; the others wait and then find them in the cache.

    Args:
        build: Builds the network.
        name: Name of the network in messages.
        weights: Name of the published weights.
        cached: The files in which the downloaded weights may lie.

    Raises:
        ValueError: A file in the cache is damaged, or the weights are not finite.
        PermissionError: The folder for downloaded weights cannot be created.
        ConnectionError: The download failed; the message says how to go on without a network connection.
    """
    from filelock import FileLock

    cache = Path(torch.hub.get_dir())
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(
            f"the folder {str(cache)!r} for downloaded weights cannot be created ({error.strerror}): set TORCH_HOME to "
            "a folder that you may write to, or pass a file as weights"
        ) from error
    try:
        with FileLock(cache / "tl_lightning.lock"):
            model = build()
    except Exception as error:
        _check_files(cached, name, weights, error)
        if not isinstance(error, (URLError, OSError)):
            raise
        raise ConnectionError(
            f"the weights {weights!r} of {name} are not in the cache and cannot be downloaded ({error}). Without a "
            "network connection, download them elsewhere and pass the .pth or .safetensors file as weights (on the "
            "command line --backbone.weights FILE). Or use the backbone EfficientNetLite (--backbone "
            "EfficientNetLite), since its weights come with a package"
        ) from error
    _check_files(cached, name, weights, None)
    places = "".join(f" in {str(file)!r}" for file in cached if file.is_file())
    check_finite(model, f"the weights {weights!r} of {name}{places}")
    return model


def _check_files(files: Sequence[Path], name: str, weights: str, error: Exception | None) -> None:
    """Raise an error that names a damaged file in the cache.

    Args:
        files: The files; those that do not exist are passed over.
        name: Name of the network.
        weights: Name of the published weights.
        error: The error with which the network could not be built, if it could not.
    """
    for file in files:
        if not file.is_file():
            continue
        damage = None
        if not file_matches_its_name(file):
            damage = f"the weights file {str(file)!r} is cut short or damaged (its SHA-256 is not that in its name)"
        elif error is not None:
            try:
                read_weights_file(file)
            except ValueError as unreadable:
                damage = str(unreadable)
        if damage is not None:
            raise ValueError(
                f"{damage}. It holds the weights {weights!r} of {name} in the cache: delete it, and run again to "
                "download it again"
            ) from error


def file_matches_its_name(file: Path) -> bool:
    """Compare a file with the SHA-256 in its name, if there is one.

    torch's hub and timm write the first digits behind a hyphen, as in ``resnet18-f37072fd.pth``. In the cache of
    Hugging Face, a file is a link to a blob that is called by all 64 digits:
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache. Both compare the digits only after a download.
    """
    found = re.search(r"-([0-9a-f]{8,64})\.|^([0-9a-f]{64})$", file.resolve().name)
    if found is None:
        return True
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest().startswith(found[1] or found[2])
