"""The base of all strategies: a boundary in the backbone and a head."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import Self

from tl_lightning.backbones import Backbone
from tl_lightning.batch import Batch
from tl_lightning.freezing import HEAD, FreezePolicy
from tl_lightning.heads import HeadCallable, LinearHead, check_head_factory
from tl_lightning.lightning_fixes import checks
from tl_lightning.lightning_fixes.mean_loss import MeanLoss
from tl_lightning.modules import checkpoint as checkpoints
from tl_lightning.modules._evaluation import EvaluationMixin
from tl_lightning.modules._exact_resume import attach_callbacks
from tl_lightning.modules._fsdp import shard
from tl_lightning.modules._optimization import OptimizationMixin
from tl_lightning.modules._stages import StagesMixin, head_name, is_map_head
from tl_lightning.modules.auxiliary import AuxiliaryHeads
from tl_lightning.utils.launcher import end_with_launcher
from tl_lightning.utils.serialization import InitArgsMixin, as_factory


class TransferClassifier(InitArgsMixin, StagesMixin, OptimizationMixin, EvaluationMixin):
    """Train a head, and the backbone from a boundary on; everything before the boundary is frozen.

    The strategies are subclasses. A research subclass overrides one of :meth:`build_head`, :meth:`compute_loss`,
    :meth:`build_metrics`, :meth:`stages_from`, :meth:`learning_rates` or :meth:`parameter_groups`. It may override any
    hook of Lightning without calling ``super()``: a resumed run stays exact, because the bookkeeping is a callback.
    Only checkpoints of weights alone need ``super().on_save_checkpoint()``, since Lightning asks no callback for them.

    A subclass may set attributes, modules included, before or after ``super().__init__()``. Attributes that
    :meth:`build_head` or :meth:`build_metrics` use come before it, because ``super().__init__()`` calls these methods.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        lr: Learning rate of the head, per optimizer step.
        optimizer: Builds the optimizer from parameter groups, without a learning rate; None builds AdamW.
        scheduler: Builds the learning rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: Interval of the given scheduler.
        head: Class of the head, or a ``functools.partial`` of one, called with the number of features and K; None takes
            :class:`tl_lightning.heads.LinearHead`. A :class:`tl_lightning.heads.MapHead` gets the spatial map and its
            number of channels.
        unfreeze_from: The deepest stage that may ever train: its name, a number k for the last k stages, or ``"head"``
            for none.
        train_bn: Let batch norm in the trainable stages normalise by the batch and update its statistics.

    Raises:
        ValueError: There are fewer than two classes, the number of names differs, a rate is not above 0, a stage is
            unknown, or a checkpoint could not restore an argument.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Prepare the instance, so that a subclass can set modules before ``super().__init__()``."""
        self = super().__new__(cls, *args, **kwargs)
        nn.Module.__init__(self)
        return self

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        head: HeadCallable | None = None,
        unfreeze_from: str | int = HEAD,
        train_bn: bool = False,
    ) -> None:
        early = dict(vars(self))  # attributes and modules that a subclass has set
        super().__init__()
        vars(self).update(early)
        end_with_launcher()  # Lightning launches further ranks by running the script again
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr is {lr}; it must be above 0 and finite")
        # Convolutions are up to 1.5 times faster in this layout:
        # https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)
        self.lr = lr
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.left_out: tuple[str, ...] = ()  # arguments that the loaded checkpoint could not restore
        self.used_lrs, self._resumed_lrs = {}, {}
        checks.check_number(self.num_classes, self.class_names)
        check_head_factory(head or LinearHead)
        checkpoints.check(self)  # now, not when the first checkpoint is due

        self.head_factory = as_factory(head or LinearHead) or head or LinearHead
        self.on_map = is_map_head(self.head_factory)
        if self.on_map and unfreeze_from not in (0, "0", HEAD):
            raise ValueError(
                f"{head_name(self.head_factory)} takes the spatial map, but {type(self).__name__} trains on pooled "
                "features; use it with CustomHeadClassifier, or choose a head on pooled features"
            )
        self.rng_state = torch.get_rng_state()
        """State of torch's generator from which the head is initialised, so that others can draw the same weights."""
        in_features = self.map_channels() if self.on_map else backbone.feature_dim
        self.head = self.build_head(in_features, num_classes)
        self.train_loss = MeanLoss()
        self.build_evaluation()
        self.freeze_policy = FreezePolicy(backbone, unfreeze_from, train_bn=train_bn)
        self.auxiliary_heads = AuxiliaryHeads(backbone, self.freeze_policy.unfreezable, num_classes)
        if self.freeze_policy.unfreezable:
            self.train_from(self.freeze_policy.unfreezable[0])

    # Methods to override ----------------------------------------------------------------------------------------------

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the head: (N, ``in_features``) to (N, ``num_classes``)."""
        return self.head_factory(in_features, num_classes)

    def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss of a batch.

        Shape:
            logits: (N, K); target: (N,). Output: ().
        """
        return nn.functional.cross_entropy(logits, target)

    def build_metrics(self) -> MetricCollection:
        """Build the metrics of validation and test; their names are logged after ``val_`` and ``test_``."""
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
                "f1": MulticlassF1Score(self.num_classes, average="macro"),
            }
        )

    # Lightning --------------------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this classifier."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        """Add the callbacks that every run needs to the trainer."""
        super(TransferClassifier, type(self)).trainer.fset(self, trainer)  # type: ignore[attr-defined]  # a property
        if trainer is not None and trainer.lightning_module is self:  # and not part of another module
            attach_callbacks(trainer)

    def configure_model(self) -> None:
        """Shard the trainable parameters, under a ModelParallelStrategy."""
        if self.device_mesh is not None and not any(isinstance(module, FSDPModule) for module in self.modules()):
            shard(self, self.freeze_policy, self.device_mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        loss = self.training_loss(batch)
        if not self.train_loss.update_called:  # once an epoch, since the metric adds up by itself
            self.log_train_loss()
        self.train_loss.update(loss.detach(), len(batch.target))
        return loss

    def log_train_loss(self) -> None:
        """Log the mean loss of the epoch."""
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)

    def training_loss(self, batch: Batch) -> Tensor:
        """Compute the mean loss of a training batch (a scalar), including the weighted losses of auxiliary heads."""
        self.auxiliary_heads.take_logits()  # discard those of forward passes outside the training step
        loss = self.compute_loss(self.forward_from(batch.inputs, batch.boundary), batch.target)
        for weight, logits in self.auxiliary_heads.take_logits():
            loss = loss + weight * self.compute_loss(logits, batch.target)
        return loss

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe this classifier in a checkpoint of weights alone, for which Lightning asks no callback."""
        if checkpoints.KEY not in checkpoint:
            checkpoint[checkpoints.KEY] = checkpoints.describe(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the data module from a checkpoint of weights alone, for which Lightning asks no callback."""
        # LightningModule.trainer raises without a trainer; only _trainer can be asked.
        if self._trainer is not None and "callbacks" not in checkpoint:
            checks.load_data_state(getattr(self.trainer, "datamodule", None), checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # a checkpoint is enough: it takes no hyperparameters
        cls, checkpoint_path: str | Path, map_location: str | torch.device | None = None
    ) -> Self:
        """Rebuild the classifier of a checkpoint, without a network, a download or another argument.

        Args:
            checkpoint_path: The file.
            map_location: Device of the weights; None takes the CPU.

        Returns:
            The classifier, in eval mode; its class is the saved one, this class or a subclass.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is no checkpoint of this library, is damaged, was saved by another class, or names a
                class that a checkpoint may not name.
        """
        return checkpoints.load(cls, checkpoint_path, map_location)
