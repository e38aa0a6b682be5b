"""Load weights from files, or from a model hub."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from torch import Tensor, nn

from tl_lightning.utils.messages import unknown

SUFFIXES = (".pth", ".pt", ".safetensors")
_LISTED = 5
_M = TypeVar("_M")


def is_path(weights: str) -> bool:
    """Tell the path of a weights file from the name of published weights."""
    return weights.endswith(SUFFIXES) or "/" in weights or "\\" in weights


def unknown_weights(given: str, names: Iterable[str], *, of: str) -> str:
    """Say that published weights are unknown, and which values are allowed.

    Args:
        given: The unknown name.
        names: Names of the published weights.
        of: Name of the model.
    """
    allowed = unknown("weights", given, names, of=of)
    return f"{allowed}. The path of a {', '.join(SUFFIXES)} file, or None, is allowed too"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file without executing anything in it.

    A mapping under ``state_dict`` or ``model`` is unwrapped. The ``module.`` that DistributedDataParallel puts before
    every name is removed.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no mapping of names to tensors.
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
            f"the weights file {str(path)!r} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); it "
            "must be a state dict saved by torch.save, or a safetensors file. Pickled objects are refused, since "
            "reading one can run any code"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not (isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values())):
        raise ValueError(
            f"the weights file {str(path)!r} holds no state dict; it must map names to tensors, at the top or under "
            "'state_dict' or 'model'"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def load_weights_file(model: nn.Module, path: str | Path, *, name: str, classifier: str) -> None:
    """Load a weights file into a network and skip the classifier in the file.

    Args:
        model: The network, whose classifier holds no parameters any more.
        path: See :func:`read_weights`.
        name: Name of the network in messages.
        classifier: Qualified name of the classifier.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Tensors are missing, unknown, or of another shape; the message lists them.
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
        f"{len(found)} {problem}: {', '.join(found[:_LISTED])}{', ...' if len(found) > _LISTED else ''}"
        for problem, found in (("missing", missing), ("not in this network", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ValueError(
            f"the weights file {str(path)!r} does not fit {name}; tensors {'; '.join(problems)}. Check that the file "
            "belongs to this model"
        )
    model.load_state_dict(state, strict=False)


def build_with_download(build: Callable[[], _M], *, name: str, weights: str) -> _M:
    """Build a network whose weights may have to be downloaded, in one process of a machine at a time.

    The first process downloads the weights; the others wait and then find them in the cache.

    Args:
        build: Builds the network.
        name: Name of the network in messages.
        weights: Name of the published weights.

    Raises:
        ConnectionError: The download failed; the message says how to go on without a network connection.
    """
    from filelock import FileLock

    cache = Path(torch.hub.get_dir())
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / "tl_lightning.lock"):
            return build()
    except (URLError, OSError) as error:
        raise ConnectionError(
            f"the weights {weights!r} of {name} are not in the cache and cannot be downloaded ({error}). Without a "
            "network connection, download them elsewhere and pass the .pth or .safetensors file as weights (on the "
            "command line --backbone.weights FILE). Or use the backbone EfficientNetLite (--backbone "
            "EfficientNetLite), since its weights come with a package"
        ) from error
