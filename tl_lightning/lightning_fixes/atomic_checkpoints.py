"""Replace a checkpoint whole or not at all, and check it when it is read.

Lightning writes a checkpoint into the system's temporary folder and moves it to its place
(https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/fabric/utilities/cloud_io.py,
``_atomic_save``, through fsspec's transactions). To another file system that is a copy into the open file: a process
that is killed meanwhile leaves a cut file, and so does a full disk. Lightning does not flush the file to the disk, and
``torch.load`` ignores the checksums in the file: it turns off miniz's check
(https://github.com/pytorch/pytorch/blob/main/caffe2/serialize/inline_container.cc). Needed for Lightning 2.6. This file
can be deleted when Lightning writes beside the target, flushes and renames, and when ``torch.load`` checks the
checksums.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from tl_lightning.utils.files import write_atomically

Read = Callable[[Path, bool], dict[str, Any]]
"""Reads a checkpoint and checks it; the flag tells whether the user allows the file to run code (pickle)."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save checkpoints as Lightning does, but beside their place, flushed and renamed; check them when they are read.

    Paths that are no local files are left to Lightning.

    Args:
        read: Reads and checks a local checkpoint.
    """

    def __init__(self, read: Read) -> None:
        self._read = read

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint whole or not at all.

        Raises:
            OSError: It cannot be written, as on a full disk.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = _local(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".*.part"):  # of a process that was killed while it wrote this checkpoint
            if left.name.startswith(f".{path.name}."):
                left.unlink(missing_ok=True)
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, onto the CPU, and check it.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged, or does not hold the weights that were saved.
        """
        if not _is_local_file_protocol(path):
            return super().load_checkpoint(path, weights_only=weights_only)
        return self._read(_local(path), weights_only is False)


def install(strategy: Strategy, read: Read) -> None:
    """Let a strategy save and load by :class:`AtomicCheckpointIO`, unless the user has chosen another plugin.

    A wrapper as ``AsyncCheckpointIO`` stays and gets the new plugin inside. ModelParallelStrategy saves by the plugin,
    but loads by itself; here it checks the file first.

    Args:
        strategy: The strategy of the trainer.
        read: Reads and checks a local checkpoint.
    """
    inner, outer = _innermost(strategy)
    if type(inner) not in (TorchCheckpointIO, AtomicCheckpointIO):
        return
    if outer is None:
        strategy.checkpoint_io = AtomicCheckpointIO(read)
    else:
        outer._checkpoint_io = AtomicCheckpointIO(read)
    if isinstance(strategy, ModelParallelStrategy):
        strategy.load_checkpoint = partial(_check_and_load, strategy, read)  # type: ignore[method-assign]


def _check_and_load(
    strategy: ModelParallelStrategy, read: Read, checkpoint_path: str | Path, weights_only: bool | None = None
) -> dict[str, Any]:
    if Path(checkpoint_path).is_file():  # and not a folder with a part for each process
        read(Path(checkpoint_path), weights_only is False)
    return type(strategy).load_checkpoint(strategy, checkpoint_path, weights_only)


def is_installed(strategy: Strategy) -> bool:
    """Return whether a strategy saves and loads by :class:`AtomicCheckpointIO`, within a wrapper or without."""
    return isinstance(_innermost(strategy)[0], AtomicCheckpointIO)


def _innermost(strategy: Strategy) -> tuple[CheckpointIO | None, _WrappingCheckpointIO | None]:
    """Return the plugin that reads and writes, and the wrapper around it."""
    inner: CheckpointIO | None = strategy.checkpoint_io
    outer = None
    while isinstance(inner, _WrappingCheckpointIO):
        outer, inner = inner, inner.checkpoint_io
    return inner, outer


def _local(path: str | Path) -> Path:
    return Path(str(path).removeprefix("file://"))
