"""A linear probe trains its head alone, logs correct metrics, and refuses wrong input before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.doubles import TinyBackbone
from tl_lightning.backbones import Backbone, TimmBackbone, TorchvisionBackbone
from tl_lightning.batch import Batch
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import LinearProbe, TransferClassifier
from tl_lightning.utils.hashing import fingerprint


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(default_root_dir=folder, **({"max_epochs": 2} | quiet | options))


def data(photos: Path, backbone: Backbone, **options: Any) -> ImageFolderDataModule:
    defaults: dict[str, Any] = {"batch_size": 8, "num_workers": 0, "preprocessing": backbone.preprocessing}
    return ImageFolderDataModule(str(photos), **(defaults | options))


class CallsTrain(pl.Callback):
    """Set train mode at the worst moments, as a user may do by hand."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.train()
        pl_module.get_submodule("backbone").train()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        pl_module.get_submodule("backbone").train()
        pl_module.train()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.get_submodule("backbone").train()


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "batch norm, dropout, stochastic depth": TinyBackbone,
    "resnet": lambda: TimmBackbone("test_resnet", weights=None),
    "vit": lambda: TimmBackbone("test_vit", weights=None),
    "convnext": lambda: TimmBackbone("test_convnext", weights=None),
    "densenet, which reads its mode in the forward pass": lambda: TorchvisionBackbone("densenet121", weights=None),
}


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("by_hand", [False, True], ids=["mode left alone", "train mode set by hand"])
def test_frozen_backbone_keeps_its_bits_and_computes_the_same_in_training(
    kind: str, by_hand: bool, photos: Path, tmp_path: Path
) -> None:
    backbone = BACKBONES[kind]()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = LinearProbe(backbone, num_classes=3)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    callbacks: list[pl.Callback] = [CallsTrain()] if by_hand else []
    module = data(photos, backbone, augment=False)
    trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(model, module)
    after = backbone.state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not seen[0].requires_grad, "the frozen backbone built an autograd graph"

    # Features in training equal features in evaluation.
    first = next(iter(module.train_dataloader()))
    model.eval()
    with torch.no_grad():
        assert torch.equal(backbone(first.inputs), seen[0])


def test_train_leaves_the_frozen_backbone_in_eval_mode() -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    model.train()
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    model.eval()
    assert not model.head.training


def test_frozen_backbone_runs_in_full_precision_under_autocast() -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3).eval()
    images = torch.randn(4, 3, 16, 16)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images)
    assert seen[1].dtype == torch.float32
    assert torch.equal(*seen)


def test_probe_learns_to_tell_the_classes_apart(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    model = LinearProbe(backbone, num_classes=3, lr=0.05)
    run = trainer(tmp_path, max_epochs=20)
    run.fit(model, data(photos, backbone, val_fraction=0.3, augment=False))
    assert run.callback_metrics["val_accuracy"] > 0.7
    assert run.callback_metrics["train_loss"] < 0.5


class Losses(pl.Callback):
    """Record the training loss that is logged at the end of each epoch, and the true mean.

    With ``stop``, fail after the first batch.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self.found: list[float] = []
        self.true: list[float] = []
        self._sum = self._count = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._sum += float(outputs["loss"]) * len(batch.target)
        self._count += len(batch.target)
        if self.stop:
            raise RuntimeError("stopped")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append(float(trainer.callback_metrics["train_loss"]))
        self.true.append(self._sum / self._count)
        self._sum = self._count = 0.0


def test_train_loss_is_the_mean_of_each_epoch_even_after_an_interrupted_fit(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    module = data(photos, model.backbone)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, callbacks=[Losses(stop=True)]).fit(model, module)
    losses = Losses()
    trainer(tmp_path, callbacks=[losses], max_epochs=3).fit(model, module)
    assert len(set(losses.true)) == 3
    assert losses.found == pytest.approx(losses.true, rel=1e-6)


def test_each_head_parameter_is_in_one_group_and_biases_have_no_weight_decay(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, data(photos, model.backbone))
    groups = run.optimizers[0].param_groups
    assert {group["name"]: group["weight_decay"] for group in groups} == {"head": 0.01, "head_no_decay": 0.0}
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.head.parameters())


def test_metrics_do_not_depend_on_the_batch_size(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    results = []
    for size in (1, 4, 100):
        torch.manual_seed(0)
        model = LinearProbe(backbone, num_classes=3)
        module = data(photos, backbone, batch_size=size, val_fraction=0.3)
        results.append(trainer(tmp_path).validate(model, module, verbose=False)[0])
    assert set(results[0]) == {"val_loss", "val_accuracy", "val_f1"}
    for other in results[1:]:
        assert other["val_accuracy"] == results[0]["val_accuracy"]
        assert other["val_f1"] == results[0]["val_f1"]
        assert other["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-6)


def test_accuracy_and_f1_equal_those_of_scikit_learn(photos: Path, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    backbone = TinyBackbone()
    model = LinearProbe(backbone, num_classes=3, lr=0.01)
    module = data(photos, backbone, val_fraction=0.3)
    run = trainer(tmp_path)
    run.fit(model, module)
    scores = run.validate(model, module, verbose=False)[0]
    model.eval()
    with torch.no_grad():
        pairs = [(model(b.inputs).argmax(1), b.target) for b in module.val_dataloader()]
    predicted, target = (torch.cat(part).numpy() for part in zip(*pairs, strict=True))
    assert scores["val_accuracy"] == pytest.approx(accuracy_score(target, predicted))
    assert scores["val_f1"] == pytest.approx(f1_score(target, predicted, average="macro"))


def test_subclass_may_override_the_loss_alone(photos: Path, tmp_path: Path) -> None:
    class Smoothed(LinearProbe):
        def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits, target, label_smoothing=0.9)

    globals()["Smoothed"] = Smoothed
    Smoothed.__qualname__ = "Smoothed"
    model = Smoothed(TinyBackbone(), num_classes=3, lr=0.01)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, data(photos, model.backbone))
    assert float(run.callback_metrics["val_loss"]) > 0.9


def test_forward_from_any_boundary_gives_the_same_logits() -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        for stage in model.backbone.stages:
            assert torch.equal(model.forward_from(model.backbone.split(stage)[0](images), stage), expected)
        assert torch.equal(model.forward_from(model.backbone(images), "head"), expected)


# Optimizers and schedulers --------------------------------------------------------------------------------------------


def fit_for_optimizer(model: LinearProbe, photos: Path, folder: Path) -> tuple[torch.optim.Optimizer, Any]:
    run = trainer(folder, max_epochs=1)
    run.fit(model, data(photos, model.backbone))
    return run.optimizers[0], run.lr_scheduler_configs


def test_users_optimizer_keeps_its_own_defaults(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3, lr=0.5, optimizer=torch.optim.SGD)
    optimizer, _ = fit_for_optimizer(model, photos, tmp_path)
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["weight_decay"] == 0 and group["initial_lr"] == 0.5 for group in optimizer.param_groups)


def test_learning_rate_given_twice_is_refused(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ValueError, match=r"SGD was given lr=0\.1, which would be ignored.*model.init_args.lr"):
        fit_for_optimizer(model, photos, tmp_path)


def test_default_scheduler_warms_up_and_ends_near_zero(photos: Path, tmp_path: Path) -> None:
    rates: list[float] = []

    class Trace(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    model = LinearProbe(TinyBackbone(), num_classes=3, lr=1.0)
    trainer(tmp_path, max_epochs=20, callbacks=[Trace()]).fit(model, data(photos, model.backbone))
    top = rates.index(max(rates))
    assert len(rates) == 20 * 4  # 33 images: 8, 8, 8 and 9
    assert top == 4
    assert rates[0] == pytest.approx(1 / 5)
    assert rates[-1] < 0.001
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(("interval", "steps"), [("epoch", 1), ("step", 4)])
def test_users_scheduler_steps_at_the_given_interval(interval: Any, steps: int, photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(
        TinyBackbone(),
        num_classes=3,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        scheduler_interval=interval,
    )
    _, (config,) = fit_for_optimizer(model, photos, tmp_path)
    assert config.scheduler.last_epoch == steps


def test_default_scheduler_without_a_run_length_is_refused(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(model, data(photos, model.backbone))


# Wrong input ----------------------------------------------------------------------------------------------------------


def test_wrong_number_of_classes_is_refused_before_training(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=5)
    with pytest.raises(ValueError, match="num_classes is 5, but the data has 3 classes: ant, bee, cat"):
        trainer(tmp_path).fit(model, data(photos, model.backbone))


def test_classes_in_another_order_are_refused(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3, class_names=["cat", "bee", "ant"])
    with pytest.raises(ValueError, match="must be the same, in the same order"):
        trainer(tmp_path).test(model, data(photos, model.backbone))


def test_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 1"):
        LinearProbe(TinyBackbone(), num_classes=1)


def test_local_class_is_refused_at_construction() -> None:
    class Local(LinearProbe):
        pass

    with pytest.raises(ValueError, match="define it at the top level"):
        Local(TinyBackbone(), num_classes=3)


def test_probe_adds_only_a_head_to_the_transfer_classifier() -> None:
    own = {name for name in vars(LinearProbe) if name not in vars(type("Empty", (), {}))}
    assert own - {"__firstlineno__", "__static_attributes__"} == {"__init__", "build_head"}
    assert issubclass(LinearProbe, TransferClassifier)
    one, same, other = (fingerprint(TinyBackbone(seed).state_dict()) for seed in (0, 0, 1))
    assert one == same != other


def test_probe_validates_before_and_between_fits(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    module = data(photos, model.backbone)
    for _ in range(2):
        trainer(tmp_path).validate(model, module, verbose=False)
        trainer(tmp_path, max_epochs=1).fit(model, module)


def test_data_prepared_for_another_backbone_is_refused(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    other = model.backbone.preprocessing._replace(mean=(0.0, 0.0, 0.0))
    with pytest.raises(
        ValueError, match=r"the data module prepares images by Preprocessing.*pass preprocessing=backbone\.preproc"
    ):
        trainer(tmp_path).fit(model, data(photos, model.backbone, preprocessing=other))


def test_replaced_backbone_is_refused_before_training(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3)
    model.backbone = torch.compile(model.backbone)  # type: ignore[assignment]  # as a user may do
    with pytest.raises(ValueError, match=r"not the one that it was given.*torch\.compile\(classifier\)"):
        trainer(tmp_path).fit(model, data(photos, TinyBackbone()))


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_learning_rate_changed_on_resume_gives_a_warning(photos: Path, tmp_path: Path) -> None:
    model = LinearProbe(TinyBackbone(), num_classes=3, lr=0.01)
    module = data(photos, model.backbone)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = LinearProbe(TinyBackbone(), num_classes=3, lr=0.5)
    with pytest.warns(UserWarning, match=r"learning rate of head is 0\.5, but the resumed run had 0\.01"):
        trainer(tmp_path).fit(other, module, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
