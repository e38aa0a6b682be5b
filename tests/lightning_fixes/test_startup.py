"""A process that waits for the other processes of its run says so, and does not wait for ever."""

import os
import signal
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from lightning.pytorch.trainer.states import TrainerStatus

from tests.staged import classifier, trainer
from tl_lightning.lightning_fixes import startup


def test_waiting_process_says_what_for_and_ends_when_nobody_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(startup, "ANNOUNCE_S", 0.1)
    monkeypatch.setattr(startup, "LIMIT_S", 1.0)
    monkeypatch.setenv("MASTER_PORT", "29511")
    run = trainer(tmp_path, devices=2, strategy="ddp")
    with pytest.raises(SystemExit) as left:
        startup._watch(run, "127.0.0.1:29511")
    assert left.value.code == 1
    announced, error = capsys.readouterr().err.splitlines()[-2:]
    assert announced.startswith("tl-lightning: rank 0 of 2 has waited 0 s for the other processes of this run")
    assert "meet at 127.0.0.1:29511; it waits 1 s at most" in announced
    assert error.startswith(
        "tl-lightning: error: rank 0 of 2 has waited 1 s at 127.0.0.1:29511, and the other processes"
    )


@pytest.mark.parametrize(("devices", "watched"), [(2, True), (1, False)])
def test_start_of_several_ranks_alone_is_watched_until_it_fails(devices: int, watched: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, devices=devices, strategy="ddp" if devices > 1 else "auto")
    model = classifier()
    run.strategy._lightning_module = model
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        given = signal.getsignal(signal.SIGTERM)
        model.trainer = run
        while_connecting = signal.getsignal(signal.SIGTERM)
        startup.end_start()
        assert signal.getsignal(signal.SIGTERM) is given
    finally:
        signal.signal(signal.SIGTERM, before)
    assert while_connecting is (signal.SIG_DFL if watched else given), "Python calls no handler while torch waits"
    watches = [thread for thread in threading.enumerate() if thread.name == "watch-start"]
    assert len(watches) == watched
    run.state.status = TrainerStatus.INTERRUPTED  # as Lightning sets it when anything fails
    for watch in watches:
        watch.join(5)
        assert not watch.is_alive()
