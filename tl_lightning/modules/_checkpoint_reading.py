"""Read a checkpoint, and check its file, its description and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tl_lightning.modules._checkpoint_file import DamagedCheckpointError, load_file, newest_sound
from tl_lightning.modules._description import FORMAT, check_content, check_format, check_training_state
from tl_lightning.utils.hashing import fingerprint
from tl_lightning.utils.messages import listed
from tl_lightning.utils.paths import short_path

if TYPE_CHECKING:
    from tl_lightning.modules.base import TransferClassifier

KEY = "tl_lightning"
_T = TypeVar("_T")

_MOVED_MODULES = {
    "tl_lightning.heads.trained": "tl_lightning.heads.neural",
    "tl_lightning.heads.fitted": "tl_lightning.heads.closed_form",
}
"""New paths of modules whose classes older checkpoints name."""


def read(path: str | Path, map_location: str | torch.device | None = None, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it, and check its checksums and its description.

    Args:
        path: The checkpoint file.
        map_location: Where to put the tensors; None puts them on the CPU.
        mmap: Map the tensors instead of reading them, to look at names, shapes and numbers. Their checksums are not
            checked. Do not read a mapped tensor's values while another process may write the file.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: The file cannot be read.
        ValueError: The file is no checkpoint of this library, is damaged, or has a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist (looked in {path.resolve().parent})")
    checkpoint = load_file(path, map_location or "cpu", mmap=mmap)
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(KEY), dict)):
        raise ValueError(  # noqa: TRY004 - the content of the file is wrong, not a type
            f"{str(path)!r} is not a checkpoint of tl_lightning: it does not describe its model. To load the weights "
            "of a backbone, use the backbone's argument 'weights'"
        )
    _check_description(path, checkpoint)
    return checkpoint


def read_for_trainer(classifier: TransferClassifier, path: Path, unpickle: bool) -> dict[str, Any]:
    """Read the checkpoint that a trainer restores, onto the CPU, and check all of it before anything is restored.

    Args:
        classifier: The classifier that gets the weights.
        path: The checkpoint file.
        unpickle: Also rebuild Python objects, which can run any code.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: The file cannot be read.
        ValueError: The file is damaged or refused, or its weights are not the saved ones or not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist (looked in {path.resolve().parent})")
    # LightningModule.trainer raises without a trainer; only _trainer can be asked.
    resumes = classifier._trainer is not None and classifier.trainer.state.fn == "fit"
    with name_sound_checkpoint(path, resumable=resumes):
        checkpoint: dict[str, Any] = load_file(path, unpickle=unpickle)
        if isinstance(checkpoint.get(KEY), dict):
            _check_description(path, checkpoint)
        if resumes:
            _name_file(path, check_training_state, checkpoint)
        check_weights(path, checkpoint, classifier.state_dict())
    return checkpoint


def check_weights(path: str | Path, checkpoint: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Check that the weights in a checkpoint are finite, and those that were saved.

    Args:
        path: The checkpoint file, for messages.
        checkpoint: Its content.
        expected: See :func:`check_finite`.

    Raises:
        ValueError: Some are not.
    """
    check_finite(path, checkpoint, expected)
    if isinstance(checkpoint.get(KEY), dict):
        check_hashes(path, checkpoint)


@contextmanager
def name_sound_checkpoint(path: str | Path, *, resumable: bool = False) -> Iterator[None]:
    """If a checkpoint turns out to be damaged, add to the message the newest sound one in its folder.

    Args:
        path: The checkpoint file.
        resumable: Name only a checkpoint that a run can resume from.
    """
    try:
        yield
    except DamagedCheckpointError as error:
        sound = newest_sound(Path(path), partial(_is_sound, resumable=resumable))
        if sound is None:
            raise
        raise DamagedCheckpointError(f"{error}. The newest sound checkpoint there is {short_path(sound)!r}") from error


def _is_sound(path: Path, *, resumable: bool) -> bool:
    try:
        checkpoint = read(path)
        check_weights(path, checkpoint, {})
        if resumable:
            check_training_state(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def _check_description(path: Path, checkpoint: dict[str, Any]) -> None:
    """Check the fields of a description, and bring it up to date."""
    description = checkpoint[KEY]
    if _name_file(path, check_format, description) > FORMAT:
        raise ValueError(
            f"{str(path)!r} was written by tl_lightning {description.get('version')}, in a later format; update "
            "tl_lightning"
        )
    if "model" in description:
        description["model"] = _with_moved_classes(description["model"])
    _name_file(path, check_content, checkpoint, description)


def _name_file(path: Path, check: Callable[..., _T], *fields: Any) -> _T:
    """Run a check of fields, and name the file if it fails."""
    try:
        return check(*fields)
    except ValueError as error:
        raise DamagedCheckpointError(f"the checkpoint {str(path)!r} is damaged: {error}") from error


def check_hashes(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Check that the weights in a checkpoint are those whose hashes its description gives.

    Raises:
        ValueError: They are not.
    """
    for part, tensors in parts(checkpoint["state_dict"]).items():
        if fingerprint(tensors) != checkpoint[KEY]["hashes"][part]:
            raise DamagedCheckpointError(
                f"the weights of the {part} in {str(path)!r} are not the saved ones: the file is damaged or was edited"
            )


def check_finite(path: str | Path, checkpoint: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Check that the weights in a checkpoint are finite.

    Args:
        path: The checkpoint file, for messages.
        checkpoint: Its content.
        expected: The tensors of the classifier before it is restored. A constant among them, as the mask of an
            attention layer, may be infinite.

    Raises:
        ValueError: Some are not; the message names them.
    """
    for key in ("state_dict", "current_model_state"):  # EMA saves the live weights as current_model_state
        state = checkpoint.get(key, {})
        bad = [name for name, tensor in state.items() if not (_is_finite(tensor) or _equal(tensor, expected.get(name)))]
        if bad:
            raise DamagedCheckpointError(
                f"{len(bad)} of the {len(state)} tensors in the checkpoint {str(path)!r} hold values that are not "
                f"finite: {listed(bad)}. Training had diverged; use an earlier checkpoint, or train with a lower rate"
            )


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and not isinstance(other, DTensor) and torch.equal(tensor.cpu(), other.cpu())


def _with_moved_classes(config: Any) -> Any:
    """Replace the old paths of classes that have moved."""
    if isinstance(config, list):
        return [_with_moved_classes(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _with_moved_classes(item) for key, item in config.items()}
    module, _, name = str(config.get("class_path", "")).rpartition(".")
    if module in _MOVED_MODULES:
        config["class_path"] = f"{_MOVED_MODULES[module]}.{name}"
    return config


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if bool(torch.isfinite(tensor.sum())):  # six times faster than a look at each value
        return True
    return bool(torch.isfinite(tensor).all())  # a sum of finite values can be infinite


def parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Divide the tensors into those of the backbone and all others, which count as the head."""
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, tensor in state.items():
        parts["backbone" if name.startswith("backbone.") else "head"][name] = tensor
    return parts
