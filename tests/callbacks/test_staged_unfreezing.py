import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from tests.callbacks.images import images
from tests.doubles import TinyBackbone
from tests.staged import EPOCHS, SCHEDULE, TRAINED, EpochRecorder, classifier, trainer
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.modules import LinearProbe, PartialFineTuning
from tl_lightning.utils.hashing import fingerprint

# The stage ------------------------------------------------------------------------------------------------------------


def test_each_epoch_moves_its_stages_and_no_others(photos: Path, tmp_path: Path) -> None:
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder = EpochRecorder()
    trainer(tmp_path, StagedUnfreezing(SCHEDULE), recorder).fit(model, images(photos))
    assert recorder.trained == TRAINED
    for epoch, (trained, state) in enumerate(zip(TRAINED, recorder.states, strict=True)):
        for name, tensor in state.items():
            stage = name.split(".")[2] if name.startswith("backbone.") else "head"
            is_parameter = name in dict(model.named_parameters())
            moved = not torch.equal(tensor, before[name])
            assert moved == (is_parameter and stage in (*trained, "head")) or (not is_parameter and stage == "head"), (
                f"epoch {epoch}: {name} {'moved' if moved else 'did not move'}"
            )
        before = state


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({0: "layer2"}, [("layer2", "layer3")] * 2),
        ({1: 2}, [(), ("layer2", "layer3")]),
        ({0: 3, 1: 0}, [("layer1", "layer2", "layer3"), ()]),
    ],
)
def test_schedule_takes_names_and_numbers_of_stages(
    schedule: dict[int, str | int], expected: list[Any], photos: Path, tmp_path: Path
) -> None:
    recorder = EpochRecorder()
    trainer(tmp_path, StagedUnfreezing(schedule), recorder, max_epochs=2).fit(classifier(), images(photos))
    assert recorder.trained == expected


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_second_fit_continues_at_the_right_stage(photos: Path, tmp_path: Path) -> None:
    recorder = EpochRecorder()
    run = trainer(tmp_path, StagedUnfreezing(SCHEDULE), recorder, max_epochs=2)
    model, data = classifier(), images(photos)
    run.fit(model, data)
    run.fit_loop.max_epochs = EPOCHS
    run.fit(model, data)
    assert recorder.trained == TRAINED


def test_callback_can_be_reused_in_a_new_trainer(photos: Path, tmp_path: Path) -> None:
    callback = StagedUnfreezing(SCHEDULE)
    ends = []
    for _ in range(2):
        recorder = EpochRecorder()
        model = classifier()
        trainer(tmp_path, callback, recorder).fit(model, images(photos))
        assert recorder.trained == TRAINED
        ends.append(fingerprint(model.state_dict()))
    assert ends[0] == ends[1]


def test_validation_and_test_change_nothing(photos: Path, tmp_path: Path) -> None:
    model, data = classifier(), images(photos)
    state = fingerprint(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    assert any(flags)
    run = trainer(tmp_path, StagedUnfreezing(SCHEDULE))
    run.validate(model, data, verbose=False)
    run.test(model, data, verbose=False)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert fingerprint(model.state_dict()) == state


# Optimizer state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_frozen_parameters_have_no_state_and_do_not_move(optimizer: Any, photos: Path, tmp_path: Path) -> None:
    """Neither weight decay nor momentum moves a stage before it is unfrozen, or after it is frozen again."""
    options = {"weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    model = classifier(optimizer=lambda groups: optimizer(groups, **options))
    states: list[set[str]] = []

    class NoteStates(EpochRecorder):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            names = {id(p): n for n, p in pl_module.named_parameters()}
            states.append(
                {names[id(p)].split(".")[2] for p in trainer.optimizers[0].state if "backbone" in names[id(p)]}
            )

    recorder = NoteStates()
    trainer(tmp_path, StagedUnfreezing(SCHEDULE), recorder).fit(model, images(photos))
    assert states == [set(), {"layer3"}, *[{"layer1", "layer2", "layer3"}] * 3]
    for name, tensor in recorder.states[3].items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, recorder.states[4][name]), f"{name} moved after its stage was frozen again"


# Early stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop_early", "epochs"), [(False, 4 + 2), (True, 2)])
def test_early_stopping_waits_for_the_last_stage(stop_early: bool, epochs: int, photos: Path, tmp_path: Path) -> None:
    """Patience counts from the start of the last stage."""

    class Worse(PartialFineTuning):
        def on_validation_epoch_end(self) -> None:
            self.log("worse", float(self.current_epoch))

    globals()["Worse"] = Worse
    Worse.__qualname__ = "Worse"
    stopping = EarlyStopping("worse", patience=1, mode="min")
    recorder = EpochRecorder()
    model = Worse(TinyBackbone(), 3, unfreeze_from="layer1")
    callback = StagedUnfreezing({2: "layer3", 4: "layer1"}, stop_early=stop_early)
    trainer(tmp_path, callback, stopping, recorder, max_epochs=20).fit(model, images(photos))
    assert len(recorder.trained) == (2 if stop_early else 5)
    assert stopping.patience == 1


class Stop(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("stopped")


def test_patience_is_restored_after_an_error_and_saved_as_the_user_gave_it(photos: Path, tmp_path: Path) -> None:
    """A run may be resumed without the callback."""
    stopping = EarlyStopping("val_loss", patience=1)
    keep = ModelCheckpoint(tmp_path, "first")
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, StagedUnfreezing({5: "layer3"}), stopping, keep, Stop(), enable_checkpointing=True).fit(
            classifier(), images(photos)
        )
    assert stopping.patience == 1
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"]
    assert saved[stopping.state_key]["patience"] == 1


# Wrong use ------------------------------------------------------------------------------------------------------------


def fit_with(schedule: dict[int, str | int], photos: Path, tmp_path: Path, model: Any = None, **options: Any) -> None:
    trainer(tmp_path, StagedUnfreezing(schedule), **options).fit(model or classifier(), images(photos))


def test_wrong_schedules_are_refused_before_training(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown stage 'layer9'; did you mean"):
        fit_with({1: "layer9"}, photos, tmp_path)
    with pytest.raises(
        ValueError, match=r"'stem' cannot train, since only layer1, layer2, layer3 may.*PartialFineTuning"
    ):
        fit_with({1: "stem"}, photos, tmp_path)
    with pytest.raises(ValueError, match="the last 9 stages are asked for, but tiny has 4"):
        fit_with({1: 9}, photos, tmp_path)
    with pytest.raises(ValueError, match=r"LinearProbe never trains its backbone.*use PartialFineTuning"):
        fit_with({1: "layer3"}, photos, tmp_path, LinearProbe(TinyBackbone(), 3))
    with pytest.raises(ValueError, match=r"schedule is \{\}"):
        StagedUnfreezing({})
    wrong: list[Any] = [{"1": "layer3"}, {1.5: "layer3"}, {-1: "layer3"}, ["layer3"], {True: "layer3"}]
    for schedule in wrong:
        with pytest.raises(ValueError, match="it must map epochs, counted from 0, to the first stage"):
            StagedUnfreezing(schedule)
    for epochs in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"warmup_epochs is {epochs}"):
            StagedUnfreezing({1: "layer3"}, warmup_epochs=epochs)


class OwnOptimizer(PartialFineTuning):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_optimizer_without_named_groups_is_refused(photos: Path, tmp_path: Path) -> None:
    model = OwnOptimizer(TinyBackbone(), 3, unfreeze_from="layer3")
    with pytest.raises(ValueError, match=r"SGD has groups without a name.*override parameter_groups"):
        fit_with({1: "layer3"}, photos, tmp_path, model)
    trainer(tmp_path, max_epochs=1).fit(OwnOptimizer(TinyBackbone(), 3, unfreeze_from="layer3"), images(photos))


def test_change_of_stages_is_printed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, StagedUnfreezing({1: "layer2", 2: "head"}), max_epochs=3).fit(classifier(), images(photos))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines == ["epoch 1: the head trains, and layer2, layer3", "epoch 2: the head trains alone"]


def test_strategy_that_cannot_unfreeze_is_refused(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, StagedUnfreezing(SCHEDULE))
    run.strategy.__class__ = FSDPStrategy  # it needs a GPU
    with pytest.raises(
        ValueError, match=r"FSDPStrategy cannot unfreeze parameters after training has started.*use strategy 'ddp'"
    ):
        StagedUnfreezing(SCHEDULE).setup(run, classifier(), "fit")
