"""The command line shows neither the warnings that every sound run would give nor advertisements."""

import inspect
import logging
import warnings
from pathlib import Path

import lightning.fabric.loggers.csv_logs
import lightning.pytorch.callbacks.model_checkpoint
import lightning.pytorch.loops.fit_loop
import lightning.pytorch.loops.prediction_loop
import lightning.pytorch.trainer.call
import pytest

import tl_lightning
from tl_lightning.lightning_fixes import warning_filters


@pytest.fixture(autouse=True)
def _restore_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "filters", [])


@pytest.mark.parametrize(
    ("module", "fragment", "message"),
    [
        (
            lightning.pytorch.loops.fit_loop,
            " module(s) in eval mode at the start of training",
            "Found 12 module(s) in eval mode at the start of training. This may lead to unexpected behavior",
        ),
        (
            lightning.pytorch.loops.fit_loop,
            "is smaller than the logging interval",
            "The number of training batches (3) is smaller than the logging interval Trainer(log_every_n_steps=50)",
        ),
        (
            lightning.pytorch.callbacks.model_checkpoint,
            " exists and is not empty",
            "Checkpoint directory runs/version_0/checkpoints exists and is not empty.",
        ),
        (
            lightning.fabric.loggers.csv_logs,
            " exists and is not empty",
            "Experiment logs directory runs/version_0 exists and is not empty. Previous log files",
        ),
        (
            lightning.pytorch.trainer.call,
            "Be aware that when using `ckpt_path`,",
            "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
        ),
        (
            lightning.pytorch.loops.prediction_loop,
            "Couldn't infer the batch indices fetched from your dataloader",
            "Couldn't infer the batch indices fetched from your dataloader: `DataLoader`",
        ),
    ],
)
def test_warning_that_lightning_gives_in_a_sound_run_is_hidden(module: object, fragment: str, message: str) -> None:
    assert fragment in inspect.getsource(module), "Lightning no longer gives it, so its filter can go"  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        warning_filters.filter_warnings()
        warnings.warn(message, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]


def test_advertisements_are_hidden_and_other_messages_are_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warning_filters.filter_warnings()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # Lightning may keep its messages from the root logger
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("\N{ELECTRIC LIGHT BULB} Tip: For seamless cloud logging")
        logger.info("GPU available: False, used: False")
        logger.info("`Trainer.fit` stopped: `max_epochs=1` reached.")
        logger.info("`Trainer.fit` stopped: `max_steps=1` reached.")
    assert [record.getMessage() for record in caplog.records] == ["`Trainer.fit` stopped: `max_steps=1` reached."]


def test_warning_of_the_package_is_shown_without_its_place_in_the_code() -> None:
    with warnings.catch_warnings():
        warning_filters.filter_warnings()
    ours = str(Path(tl_lightning.__file__).parent / "optim.py")
    assert warnings.formatwarning("the rate is 0", UserWarning, ours, 3) == "the rate is 0\n"
    assert warnings.formatwarning("other", UserWarning, "/lib/torch/x.py", 3).startswith("/lib/torch/x.py:3: UserWarn")
