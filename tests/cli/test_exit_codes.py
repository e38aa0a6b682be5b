"""A failure of a known kind is a few lines and an exit code; an unknown one keeps its traceback."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from tests.cli.runs import BACKBONE, on_cpu
from tl_lightning import __main__
from tl_lightning.cli.exit_codes import explain_failure
from tl_lightning.utils.messages import unknown
from tl_lightning.utils.serialization import trusted_class

FAILING = "tests.cli.test_exit_codes.Failing"


class Failing(pl.Callback):
    """Fail at a batch of training."""

    error: BaseException = KeyboardInterrupt()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        raise self.error


class BrokenCallback(pl.Callback):
    def __init__(self) -> None:
        raise KeyError("a mistake of the user")


@pytest.fixture
def program(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs a fit as a process would, and gives the exit code."""

    def run(*options: str) -> int | str | None:
        monkeypatch.setattr(sys, "path", sys.path.copy())
        monkeypatch.setattr(sys, "argv", ["tl-lightning", "fit", BACKBONE, *on_cpu(photos, tmp_path), *options])
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        return caught.value.code

    return run


def test_ctrl_c_within_a_fit_exits_with_130_and_says_how_to_resume(
    program: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Failing, "error", KeyboardInterrupt())
    try:
        assert program(f"--trainer.callbacks={FAILING}", "--trainer.max_epochs=1") == 130
    finally:
        signal.signal(signal.SIGINT, before[0])  # Lightning has set it to be ignored
    printed = capsys.readouterr()
    assert "nothing yet: checkpoints are written after each epoch" in printed.out
    assert "Traceback" not in printed.err
    assert signal.getsignal(signal.SIGTERM) == before[1]


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_within_a_fit_is_one_message_and_exit_code_1(
    program: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_disk, "__code__", full_disk.__code__.replace(co_filename="<frozen io>"))
    monkeypatch.setattr(CSVLogger, "save", full_disk)
    assert program("--trainer.max_epochs=1") == 1
    message = capsys.readouterr().err.partition("tl-lightning: error: ")[2]
    assert message.startswith("the disk is full ([Errno 28] No space left on device): free some space, or write")
    assert len(message.splitlines()) == 2


def test_traceback_is_shown_on_request(program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TL_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="invalid accelerator name"):
        program("--trainer.accelerator=quantum")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([f"--trainer.callbacks={FAILING}"], TypeError("a mistake of the user")),
        ([f"--trainer.callbacks={FAILING}"], OSError(errno.EACCES, "denied to the code of the user")),
        (["--trainer.callbacks=tests.cli.test_exit_codes.BrokenCallback"], KeyError("a mistake of the user")),
    ],
)
def test_mistake_in_the_code_of_the_user_keeps_its_traceback(
    options: list[str], error: BaseException, program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "error", error)
    with pytest.raises(type(error) if options[0].endswith(FAILING) else ValueError) as caught:
        program(*options)
    shown = "".join(traceback.format_exception(caught.value))
    assert f"{type(error).__name__}: " in shown
    assert "in on_train_batch_start" in shown or "in __init__\n    raise KeyError" in shown


def raised(action: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - any error is looked at
        action()
    # pytest's own frame and this file would count as code of the user
    error = caught.value
    error.__traceback__ = caught.tb.tb_next.tb_next if caught.tb.tb_next else None
    return error


def test_error_of_this_package_is_found_under_the_errors_that_it_caused() -> None:
    def wrap_as_a_library_does() -> None:
        try:
            trusted_class("antigravity.Module")
        except ValueError as error:
            raise RuntimeError("parsing failed") from error

    explained = explain_failure(raised(wrap_as_a_library_does), has_begun=False)
    assert explained is not None
    assert explained[0].startswith("the checkpoint names the class 'antigravity.Module'")
    assert explained[1] == 2


def test_error_of_another_library_keeps_its_traceback() -> None:
    assert explain_failure(raised(lambda: torch.zeros(2) @ torch.zeros(3)), has_begun=False) is None


def test_fault_of_this_package_that_no_statement_raised_keeps_its_traceback() -> None:
    fault = raised(lambda: unknown("kind", "x", None))  # type: ignore[arg-type]  # this is the fault
    assert "not iterable" in str(fault)
    assert explain_failure(fault, has_begun=False) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x.csv"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/home/x"), "/home/x: Permission denied. Check the perm"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "out of memory (CUDA out of memory)"),
    ],
)
def test_fault_of_the_machine_is_explained(error: BaseException, said: str) -> None:
    explained = explain_failure(error, has_begun=True)
    assert explained is not None
    assert explained[0].startswith(said)
    assert explained[1] == 1
