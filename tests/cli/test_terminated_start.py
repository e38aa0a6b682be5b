"""A rank that is told to terminate while it starts, and so alone, fails, so that the others do not wait for it."""

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

from tests.cli.runs import BACKBONE, on_cpu
from tl_lightning import __main__


class TerminatedAtStart(pl.Callback):
    """Take the place of the second rank of a machine, and get SIGTERM before training."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        os.environ["LOCAL_RANK"] = "1"
        os.kill(os.getpid(), signal.SIGTERM)


def test_second_rank_that_is_terminated_at_the_start_does_not_end_as_if_it_had_succeeded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*on_cpu(photos, tmp_path), "--trainer.callbacks=tests.cli.test_terminated_start.TerminatedAtStart"]
    monkeypatch.setenv("LOCAL_RANK", "0")  # restored at the end
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["tl-lightning", "fit", BACKBONE, *options])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 143
