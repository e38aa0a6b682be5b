"""Two runs never write to one folder at once, and a killed run leaves no lock behind."""

import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest

from tests.cli.runs import PARTIAL, SCHEDULE_CHANGED, Run, fit, metrics
from tl_lightning.cli.exit_codes import explain_failure
from tl_lightning.cli.run_folder import create_run_folder, remove_run_folder
from tl_lightning.cli.run_lock import lock_run_folder, unlock_run_folder


class ResumesTwice(pl.Callback):
    """Start the same resumed run a second time when training begins, and note why it does not start."""

    arguments: tuple[str, ...] = ()
    refusal: BaseException | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        photos, runs, *options = self.arguments
        with pytest.raises(RuntimeError) as refusal:
            fit(Path(photos), Path(runs), *options)
        type(self).refusal = refusal.value


@pytest.mark.filterwarnings(SCHEDULE_CHANGED)
def test_second_resume_of_one_run_is_refused_while_the_first_goes_on(short: Run, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "version_0"
    shutil.copytree(short.folder, folder)
    options = (*PARTIAL, "--ckpt_path=last", "--trainer.max_epochs=3")
    ResumesTwice.arguments = (str(photos), str(folder.parent), *options)
    fit(photos, folder.parent, *options, "--trainer.callbacks=tests.cli.test_run_lock.ResumesTwice")
    assert ResumesTwice.refusal is not None
    message, code = explain_failure(ResumesTwice.refusal, has_begun=False) or ("", 0)
    assert code == 1
    assert message == (
        f"another run is using {str(folder)!r}: wait until it has ended, or end it; to train beside it, start a new "
        "run without --ckpt_path"
    )
    rows = metrics(folder)
    assert [row["epoch"] for row in rows if row["val_loss"]] == ["0", "1", "2"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["version_0"]
    unlock_run_folder(lock_run_folder(folder))  # the run that has ended holds it no longer


def _fork(folder: Path | None = None) -> int:
    """Fork a process that waits, after it has locked a folder, and return its number."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if folder is not None:
                lock_run_folder(folder)
            os.write(writer, b"ready")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(reader, 5) == b"ready"
    return child


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    child = _fork(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="another run is using"):
            lock_run_folder(tmp_path)
    finally:
        _kill(child)
    unlock_run_folder(lock_run_folder(tmp_path))


def test_forked_worker_process_does_not_hold_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    held = lock_run_folder(tmp_path)
    assert held is not None
    child = _fork()
    try:
        os.close(held)  # as when the main process is killed
        unlock_run_folder(lock_run_folder(tmp_path))
    finally:
        _kill(child)


def test_run_goes_on_with_a_warning_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\): start no second run in it"):
        assert lock_run_folder(tmp_path) is None


def test_lock_file_does_not_keep_an_empty_run_folder(tmp_path: Path) -> None:
    folder = create_run_folder(tmp_path)
    held = lock_run_folder(folder)
    remove_run_folder(folder)
    unlock_run_folder(held)
    assert not folder.exists()
