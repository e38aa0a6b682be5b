"""A fit whose loss is not finite ends with one message and exit code 1, also on several ranks."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

from tests.cli.runs import BACKBONE, on_cpu
from tl_lightning import __main__


class BecomesSecondRank(pl.Callback):
    """Take the place of the second rank of a machine when the run has failed, as it does on all ranks."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        os.environ["LOCAL_RANK"] = "1"


@pytest.mark.parametrize("rank", [0, 1])
def test_diverging_fit_is_one_message_and_exit_code_1_of_the_first_rank_alone(
    rank: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model.lr=1e30",
        "--data.batch_size=8",
        "--trainer.max_epochs=4",
        "--trainer.enable_progress_bar=false",
    ]
    options += ["--trainer.callbacks=tests.cli.test_not_finite.BecomesSecondRank"] if rank else []
    monkeypatch.setenv("LOCAL_RANK", "0")  # restored at the end, whatever the run does to it
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["tl-lightning", "fit", BACKBONE, *on_cpu(photos, tmp_path), *options])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    printed = capsys.readouterr().err
    message = printed.partition("tl-lightning: error: ")[2]
    if rank:
        assert ended.value.code == 0  # if it failed, Lightning would kill the first rank before it has said why
        assert message == ""
    else:
        assert ended.value.code == 1
        assert message.startswith("the loss is ")
        assert "in epoch 0, at step 2 (learning rates: head " in message
        assert len(message.splitlines()) == 1
