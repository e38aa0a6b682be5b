"""StagesMixin runs on tiny data, for the tests of one process and of several."""

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
EPOCHS = len(TRAINED)

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def classifier(backbone: TinyBackbone | None = None, **options: Any) -> PartialFineTuning:
    torch.manual_seed(5)
    defaults: dict[str, Any] = {"unfreeze_from": "layer1", "lr": 0.01, "backbone_lr": 0.005}
    return PartialFineTuning(backbone or TinyBackbone(), num_classes=3, **(defaults | options))


def images(photos: str | Path, **options: Any) -> ImageFolderDataModule:
    preprocessing = TinyBackbone().preprocessing
    defaults: dict[str, Any] = {"batch_size": 8, "num_workers": 0, "val_fraction": 0.3, "preprocessing": preprocessing}
    return ImageFolderDataModule(str(photos), **(defaults | options))


def trainer(folder: str | Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **({"max_epochs": EPOCHS} | QUIET | options))


class Watch(pl.Callback):
    """Note, for each epoch, what trains, what it is made of, and what moved."""

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
        moving = {
            n.split(".")[2] for n, p in pl_module.named_parameters() if n.startswith("backbone.") and p.requires_grad
        }
        assert moving == set(pl_module.freeze_policy.trained)
        self.trained.append(tuple(sorted(moving)))
        self.states.append(copy.deepcopy(pl_module.state_dict()))


Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def schedulers(steps: int) -> dict[str, Scheduler | None]:
    """All kinds of schedule; by epoch but for the one-cycle one, which has to know the number of steps."""
    s = torch.optim.lr_scheduler
    return {
        "ours": None,
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
