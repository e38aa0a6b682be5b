"""A checkpoint is replaced whole or not at all, wherever temporary files lie, and on a full disk."""

import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from tests.lightning_fixes.full_disk import limited_file_size
from tests.staged import classifier, images, trainer
from tl_lightning.lightning_fixes.atomic_checkpoints import AtomicCheckpointIO

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - another file system than that of tmp_path


@pytest.fixture(scope="module")
def fitted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.Trainer:
    """A trainer that can save its checkpoint anywhere."""
    run = trainer(tmp_path_factory.mktemp("fitted"), max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    run.fit(classifier(), images(photos))
    return run


def killed_while_saving(fitted: pl.Trainer, path: Path, kill: Any) -> int:
    """Save in a process of its own that kills itself when it copies or flushes a file; return its signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads in a forked process
        child = os.fork()
    if child == 0:
        os.sendfile = os.fsync = (
            kill  # shutil copies with the first; an atomic write calls the second before it renames
        )
        fitted.save_checkpoint(path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_checkpoint_survives_a_kill_while_the_next_is_written_to_another_file_system(
    fitted: pl.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else tmp_path))
    try:
        path = folder / "last.ckpt"
        fitted.save_checkpoint(path)
        before = path.read_bytes()
        code = killed_while_saving(fitted, path, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert code == -signal.SIGKILL
        assert path.read_bytes() == before
        assert [file.name for file in folder.glob("*.ckpt")] == ["last.ckpt"], "the unfinished file is no checkpoint"
        fitted.save_checkpoint(path)
        assert [file.name for file in folder.iterdir()] == ["last.ckpt"], "the unfinished file is removed"
    finally:
        shutil.rmtree(folder)


def test_checkpoint_survives_a_full_disk(fitted: pl.Trainer, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    fitted.save_checkpoint(path)
    before = path.read_bytes()
    with (
        limited_file_size(len(before) // 2),
        pytest.raises(OSError, match=r"last\.ckpt' cannot be written \(File too large\).*from before is unchanged"),
    ):
        fitted.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_plugin_of_the_user_is_kept_and_a_wrapper_saves_atomically(wrapped: bool, photos: Path, tmp_path: Path) -> None:
    class Mine(TorchCheckpointIO):
        """A user's plugin."""

    plugin = AsyncCheckpointIO() if wrapped else Mine()
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1, plugins=[plugin])
    run.fit(classifier(), images(photos))
    assert run.strategy.checkpoint_io is plugin
    if isinstance(plugin, AsyncCheckpointIO):
        assert type(plugin.checkpoint_io) is AtomicCheckpointIO
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.strategy.checkpoint_io.teardown()
    trainer(tmp_path, plugins=[plugin]).validate(
        classifier(), images(photos), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
    )
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["state_dict"]["backbone.model.stem.conv.weight"] += 0.5
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"the weights of the backbone in .*a\.ckpt' are not the saved ones"):
        trainer(tmp_path, plugins=[plugin]).validate(classifier(), images(photos), ckpt_path=tmp_path / "a.ckpt")
