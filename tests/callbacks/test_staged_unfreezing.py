import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from tests.callbacks.images import images
from tests.doubles import TinyBackbone
from tests.staged import EPOCHS, SCHEDULE, TRAINED, EpochRecorder, classifier, schedulers, trainer
from tl_lightning.batch import Batch
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.modules import LinearProbe, PartialFineTuning
from tl_lightning.utils.hashing import fingerprint

# The resumed runs write no checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
    # torch 2.15 warns of its own SequentialLR.
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
]


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


# Resuming -------------------------------------------------------------------------------------------------------------


def run(
    photos: Path, folder: Path, resume: Path | None = None, **options: Any
) -> tuple[PartialFineTuning, EpochRecorder]:
    model = classifier(**{key: options.pop(key) for key in ("scheduler", "scheduler_interval") if key in options})
    callbacks: list[pl.Callback] = [StagedUnfreezing(options.pop("schedule", SCHEDULE)), recorder := EpochRecorder()]
    if resume is None:
        each_epoch = ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        each_step = ModelCheckpoint(folder, "step-{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks += [each_epoch, *([each_step] if options.pop("each_step", False) else [])]
    options["enable_checkpointing"] = resume is None
    torch.manual_seed(0 if resume is None else 99)
    trainer(folder, *callbacks, **options).fit(
        model, images(photos, augment=False), ckpt_path=resume, weights_only=True
    )
    return model, recorder


@pytest.mark.parametrize("name", schedulers(1))
def test_run_resumed_after_any_epoch_ends_with_the_same_bits(name: str, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheduler": schedulers(EPOCHS * 3)[name]}
    options["scheduler_interval"] = "step" if name == "OneCycleLR" else "epoch"
    model, recorder = run(photos, tmp_path, **options)
    assert recorder.trained == TRAINED
    checkpoints = sorted(tmp_path.glob("epoch-*.ckpt"))
    assert len(checkpoints) == EPOCHS
    for epoch, checkpoint in enumerate(checkpoints[:-1]):
        resumed, recorder = run(photos, tmp_path, checkpoint, **options)
        assert recorder.trained == TRAINED[epoch + 1 :], checkpoint.name
        assert fingerprint(resumed.state_dict()) == fingerprint(model.state_dict()), checkpoint.name


def test_run_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    model, _ = run(photos, tmp_path, each_step=True)
    checkpoints = sorted(tmp_path.glob("step-*.ckpt"))
    assert len(checkpoints) == 3 * EPOCHS
    for checkpoint in checkpoints:
        resumed, recorder = run(photos, tmp_path, checkpoint)
        assert recorder.trained == TRAINED[len(TRAINED) - len(recorder.trained) :], checkpoint.name
        assert fingerprint(resumed.state_dict()) == fingerprint(model.state_dict()), checkpoint.name


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_schedule_may_change_on_resume(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path, max_epochs=2)
    _, recorder = run(photos, tmp_path, tmp_path / "epoch-epoch=1.ckpt", schedule={0: "layer2", 3: "layer3"})
    assert recorder.trained == [("layer2", "layer3"), ("layer3",), ("layer3",)]


# Learning rates -------------------------------------------------------------------------------------------------------


def test_each_stage_warms_up_from_its_own_first_epoch(photos: Path, tmp_path: Path) -> None:
    """The learning rates that it scales are those of the user's scheduler."""
    recorder = EpochRecorder()
    callback = StagedUnfreezing({1: "layer3", 3: "layer2", 4: "head", 5: "layer2"}, warmup_epochs=1.0)
    model = classifier(
        lr=1.0, backbone_lr=0.5, layer_decay=0.5, unfreeze_from="layer2", scheduler=schedulers(0)["StepLR"]
    )
    run = trainer(tmp_path, callback, recorder, max_epochs=6)
    run.fit(model, images(photos))
    table = [[round(step[name], 4) for name in ("head", "layer3", "layer2")] for step in recorder.steps]
    third = 1 / 3
    expected = [
        # head   layer3          layer2
        *[(1.0, 0.0, 0.0)] * 3,
        *((1.0, 0.5 * share, 0.0) for share in (third, 2 * third, 1.0)),
        *[(0.5, 0.25, 0.0)] * 3,
        *((0.5, 0.25, 0.125 * share) for share in (third, 2 * third, 1.0)),
        *[(0.25, 0.0, 0.0)] * 3,
        *((0.25, 0.125 * share, 0.0625 * share) for share in (third, 2 * third, 1.0)),
    ]
    assert table == [pytest.approx(row, abs=1e-4) for row in expected]
    assert [group["lr"] for group in run.optimizers[0].param_groups[::2]] == [0.125, 0.0625, 0.03125], (
        "the callback has restored the rates"
    )
    logged = {name: float(run.callback_metrics[f"lr-{name}"]) for name in ("head", "layer3", "layer2")}
    assert logged == pytest.approx({"head": 0.25, "layer3": 0.125, "layer2": 0.0625}), (
        "the logged rate is the one that was used"
    )


class Stream(torch.utils.data.IterableDataset[Batch]):
    """Three batches of a length that is not known beforehand."""

    def __iter__(self) -> Iterator[Batch]:
        for number in range(3):
            images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(number))
            yield Batch(images, torch.arange(4) % 3, torch.arange(4), None)


def test_warm_up_counts_whole_epochs_if_their_length_is_unknown(tmp_path: Path) -> None:
    recorder = EpochRecorder()
    model = classifier(lr=1.0, backbone_lr=0.5, scheduler=schedulers(0)["none"], unfreeze_from="layer3")
    run = trainer(tmp_path, StagedUnfreezing({1: "layer3"}, warmup_epochs=2.0), recorder, max_epochs=3)
    stream: Any = torch.utils.data.DataLoader(Stream(), batch_size=None)
    run.fit(model, stream, stream)
    assert [step["layer3"] for step in recorder.steps] == [0.0] * 3 + [0.25] * 3 + [0.5] * 3


@pytest.mark.parametrize("name", schedulers(1))
def test_schedulers_keep_the_ratio_between_groups(name: str, photos: Path, tmp_path: Path) -> None:
    interval: Any = "step" if name == "OneCycleLR" else "epoch"
    model = classifier(layer_decay=0.5, scheduler=schedulers(EPOCHS * 3)[name], scheduler_interval=interval)
    seen: list[list[float]] = []

    class NoteRates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups[::2]])

    trainer(tmp_path, NoteRates()).fit(model, images(photos))
    assert len(seen) == EPOCHS * 3
    for head, layer3, layer2, layer1 in seen:
        assert (layer3 / head, layer2 / head, layer1 / head) == pytest.approx((0.5, 0.25, 0.125), rel=1e-6)


def test_scheduler_that_loses_the_ratio_is_refused(photos: Path, tmp_path: Path) -> None:
    class Flat(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float | torch.Tensor]:
            return [0.1 for _ in self.base_lrs]

    with pytest.raises(ValueError, match=r"Flat gives every group the learning rate 0\.1, but they had head 0\.01"):
        trainer(tmp_path).fit(classifier(scheduler=Flat), images(photos))


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
