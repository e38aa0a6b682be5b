"""A subclass may override any hook of Lightning without ``super()``, and set attributes at any time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.doubles import TinyBackbone
from tests.staged import images, trainer
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.heads import LinearHead
from tl_lightning.modules import LinearProbe, PartialFineTuning, TransferClassifier
from tl_lightning.utils.hashing import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")

HOOKS = (
    "setup",
    "configure_model",
    "configure_callbacks",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
"""Each hook that TransferClassifier has ever overridden."""


class DropoutFineTuning(PartialFineTuning):
    """Use a head with dropout and running statistics, which a resumed run must restore."""

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        return LinearHead(in_features, num_classes, standardize=True, dropout=0.5)


def _ignore(self: Any, *args: Any, **kwargs: Any) -> Any:
    return []


CLASSES: Mapping[str, type[PartialFineTuning]] = {
    hook: type(f"Overrides_{hook}", (DropoutFineTuning,), {hook: _ignore, "__module__": __name__}) for hook in HOOKS
}
globals().update({cls.__name__: cls for cls in CLASSES.values()})  # importable, so that checkpoints can name them


class OwnStep(DropoutFineTuning):
    """Define the training step and the optimizer, as a plain LightningModule does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch.inputs), batch.target, label_smoothing=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((p for p in self.parameters()), lr=0.01)


def fit(
    cls: type[PartialFineTuning], photos: Path, folder: Path, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    torch.manual_seed(0 if resume is None else 99)  # a resumed process starts from another RNG state
    model = cls(TinyBackbone(), num_classes=3, unfreeze_from="layer2", lr=0.01, backbone_lr=0.005, train_bn=True)
    data = images(photos, batch_size=8)
    saves = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    staged: list[pl.Callback] = [] if cls is OwnStep else [StagedUnfreezing({1: "layer2"})]
    run = trainer(
        folder, *staged, *([] if resume else [saves]), max_epochs=3, enable_checkpointing=resume is None, **options
    )
    run.fit(model, data, ckpt_path=resume, weights_only=True)
    return {"weights": fingerprint(model.state_dict()), "steps": run.global_step}


@pytest.mark.parametrize("cls", [*CLASSES.values(), OwnStep], ids=[*HOOKS, "training_step, configure_optimizers"])
def test_subclass_that_overrides_a_hook_resumes_with_the_same_bits(
    cls: type[PartialFineTuning], photos: Path, tmp_path: Path
) -> None:
    whole = fit(cls, photos, tmp_path)
    expected = whole if cls is OwnStep else fit(DropoutFineTuning, photos, tmp_path / "plain")
    assert whole == expected, "the overridden hook changes the run"
    for step in (2, 4, 6):  # within the first epoch, at its end, and after stages were unfrozen
        assert fit(cls, photos, tmp_path, resume=tmp_path / f"step={step}.ckpt") == whole, step
    loaded = cls.load_from_checkpoint(tmp_path / f"step={whole['steps']}.ckpt")
    assert type(loaded) is cls
    assert fingerprint(loaded.state_dict()) == whole["weights"]


def test_callbacks_of_a_subclass_join_the_callbacks_of_every_run(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(WithCallback(TinyBackbone(), num_classes=3), images(photos))
    names = [type(callback).__name__ for callback in run.callbacks]  # type: ignore[attr-defined]
    assert {"FrozenGuard", "StepOnPlateau", "SigtermHandler", "ExactResume", "OwnCallback"} <= set(names)
    assert len(names) == len(set(names))
    run.fit(WithCallback(TinyBackbone(), num_classes=3), images(photos))
    assert sorted(type(callback).__name__ for callback in run.callbacks) == sorted(names), "added twice"  # type: ignore[attr-defined]


class OwnCallback(pl.Callback):
    pass


class WithCallback(LinearProbe):
    def configure_callbacks(self) -> list[pl.Callback]:
        return [OwnCallback()]


class EarlyModules(LinearProbe):
    """Set a module, a parameter, a buffer and an attribute before ``super().__init__()``, and a module after it."""

    def __init__(self, backbone: TinyBackbone, num_classes: int, width: int = 5) -> None:
        self.width = width
        self.reduce = nn.Linear(24, width)
        self.temperature = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(width))
        self.strict_loading = False
        super().__init__(backbone, num_classes, lr=0.01)
        self.late = nn.Linear(num_classes, num_classes)

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        assert isinstance(self.reduce, nn.Linear)
        return nn.Sequential(self.reduce, nn.Linear(self.width, num_classes))

    def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().compute_loss(self.late(logits) * self.temperature, target)


def test_modules_set_before_and_after_super_init_train_and_are_restored(photos: Path, tmp_path: Path) -> None:
    model = EarlyModules(TinyBackbone(), num_classes=3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = set(before)
    assert {"reduce.weight", "temperature", "late.weight"} <= names
    assert "shift" in dict(model.named_buffers())
    assert model.strict_loading is False
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, images(photos))
    for name in ("reduce.weight", "temperature", "late.weight"):
        assert not torch.equal(before[name], model.get_parameter(name)), f"{name} did not train"
    run.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert type(loaded) is EarlyModules
    assert fingerprint(loaded.state_dict()) == fingerprint(model.state_dict())


class Student(pl.LightningModule):
    """A plain module that has a classifier inside, as the teacher of a distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = LinearProbe(TinyBackbone(), num_classes=3)
        self.head = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.teacher(batch.inputs)), batch.target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is scored."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def test_a_plain_module_may_hold_a_classifier(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(Student(), images(photos))
    assert "ExactResume" not in [type(callback).__name__ for callback in run.callbacks]  # type: ignore[attr-defined]


def test_a_trainer_of_a_classifier_refuses_a_plain_module(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(LinearProbe(TinyBackbone(), num_classes=3), images(photos))
    with pytest.raises(TypeError, match="make a new trainer"):
        run.fit(Student(), images(photos))


def test_the_base_class_trains_from_a_boundary_by_itself(photos: Path, tmp_path: Path) -> None:
    model = TransferClassifier(TinyBackbone(), num_classes=3, unfreeze_from=1, lr=0.01)
    assert model.learning_rates() == {"head": 0.01, "layer3": 0.001}
    before = fingerprint(model.backbone.state_dict())
    trainer(tmp_path, max_epochs=1).fit(model, images(photos))
    assert fingerprint(model.backbone.state_dict()) != before
