"""Weights from files, and from a hub where there is one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from torch import Tensor, nn

SUFFIXES = (".pth", ".pt", ".safetensors")
_LISTED = 5
_M = TypeVar("_M")


def is_path(weights: str) -> bool:
    """Return whether ``weights`` means a file rather than the name of published weights."""
    return weights.endswith(SUFFIXES) or "/" in weights or "\\" in weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file, never executing anything in it.

    A mapping under ``state_dict`` or ``model`` is unwrapped, and the ``module.`` that DistributedDataParallel puts before
    every name is taken off.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read as tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights file {str(path)!r} does not exist (looked in {path.resolve().parent}); give the path of a "
            f"{', '.join(SUFFIXES)} file, the name of published weights, or None"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the weights file {str(path)!r} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); it must "
            "be a state dict saved by torch.save, or a safetensors file. Pickled objects are refused, since reading one "
            "runs whatever code is in it"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not (isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values())):
        raise ValueError(f"the weights file {str(path)!r} holds no state dict, that is, no mapping of names to tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def load_file_into(model: nn.Module, path: str | Path, *, name: str, classifier: str) -> None:
    """Load a file into a network, with or without the file's own classifier.

    Args:
        model: The network; what it calls its classifier holds no parameters any more.
        path: A file for :func:`read_weights`.
        name: What messages call the network.
        classifier: Qualified name of the classifier; what the file has under it is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Tensors are missing, too many, or of another shape, as listed in the message.
    """
    state = {key: tensor for key, tensor in read_weights(path).items() if not key.startswith(f"{classifier}.")}
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:_LISTED])}{', ...' if len(found) > _LISTED else ''}"
        for what, found in (("missing", missing), ("not of this network", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ValueError(
            f"the weights file {str(path)!r} does not fit {name}; tensors {'; '.join(problems)}. Is it the file of another "
            "model?"
        )
    model.load_state_dict(state, strict=False)


def with_download(build: Callable[[], _M], *, name: str, weights: str) -> _M:
    """Build a network whose weights may have to be downloaded, one process of a machine at a time.

    The first process downloads; the others wait and then find the file in the cache.

    Args:
        build: Builds the network.
        name: What messages call it.
        weights: Name of the published weights.

    Raises:
        ConnectionError: The download failed; the message says how to go on without a network.
    """
    from filelock import FileLock

    cache = Path(torch.hub.get_dir())
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / "tl_lightning.lock"):
            return build()
    except (URLError, OSError) as error:
        raise ConnectionError(
            f"the weights {weights!r} of {name} are neither in the cache nor could they be downloaded ({error}). Without a "
            "network: download them elsewhere and give the .pth or .safetensors file as weights (on the command line "
            "--backbone.weights FILE), or use the backbone EfficientNetLite (--backbone EfficientNetLite), whose weights come "
            "with a package"
        ) from error
