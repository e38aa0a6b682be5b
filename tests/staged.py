"""Build small runs with staged unfreezing, for tests on one process and on several ranks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tests.doubles import TinyBackbone
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import PartialFineTuning

SCHEDULE: dict[int, str | int] = {1: "layer3", 2: "layer1", 4: "head"}
TRAINED = [(), ("layer3",), ("layer1", "layer2", "layer3"), ("layer1", "layer2", "layer3"), ()]
"""Names of the trainable backbone stages in each epoch of ``SCHEDULE``."""
EPOCHS = len(TRAINED)

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def classifier(backbone: TinyBackbone | None = None, **options: Any) -> PartialFineTuning:
    """Build a classifier with the same initial weights in each call."""
    torch.manual_seed(5)
    defaults: dict[str, Any] = {"unfreeze_from": "layer1", "lr": 0.01, "backbone_lr": 0.005}
    return PartialFineTuning(backbone or TinyBackbone(), num_classes=3, **(defaults | options))


def images(photos: str | Path, **options: Any) -> ImageFolderDataModule:
    """Build the data module of an image folder for the tiny backbone."""
    preprocessing = TinyBackbone().preprocessing
    defaults: dict[str, Any] = {"batch_size": 8, "num_workers": 0, "val_fraction": 0.3, "preprocessing": preprocessing}
    return ImageFolderDataModule(str(photos), **(defaults | options))


def trainer(folder: str | Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Build a trainer on the CPU without output."""
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **({"max_epochs": EPOCHS} | QUIET | options))


class EpochRecorder(pl.Callback):
    """Record the trainable stages and the state after each epoch, and the learning rates of each step."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, ...]] = []
        self.states: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, float]] = []
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, PartialFineTuning)
        self.steps.append(dict(pl_module.used_lrs))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PartialFineTuning)
        trainable = {
            n.split(".")[2] for n, p in pl_module.named_parameters() if n.startswith("backbone.") and p.requires_grad
        }
        assert trainable == set(pl_module.freeze_policy.unfrozen)
        self.trained.append(tuple(sorted(trainable)))
        self.states.append(copy.deepcopy(pl_module.state_dict()))


Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def schedulers(steps: int) -> dict[str, Scheduler | None]:
    """Return a factory for each kind of scheduler, and None for the default one.

    ``OneCycleLR`` counts steps up to ``steps``, the length of the whole run; the other factories count epochs.
    """
    s = torch.optim.lr_scheduler
    return {
        "default": None,
        "none": lambda o: s.ConstantLR(o, factor=1.0),
        "LambdaLR": lambda o: s.LambdaLR(o, lambda epoch: 0.8**epoch),
        "StepLR": lambda o: s.StepLR(o, step_size=2, gamma=0.5),
        "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, T_max=EPOCHS),
        "OneCycleLR": lambda o: s.OneCycleLR(o, max_lr=0.01, total_steps=steps),
        "ExponentialLR": lambda o: s.ExponentialLR(o, gamma=0.9),
        "SequentialLR": lambda o: s.SequentialLR(
            o, [s.LinearLR(o, 0.5, total_iters=2), s.ExponentialLR(o, 0.9)], milestones=[2]
        ),
    }
