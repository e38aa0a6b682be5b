"""What all strategies share."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import Self

from tl_lightning.backbones import Backbone
from tl_lightning.batch import Batch
from tl_lightning.freezing import FreezePolicy
from tl_lightning.heads import LinearHead
from tl_lightning.lightning_fixes import checks
from tl_lightning.lightning_fixes.mean_loss import MeanLoss
from tl_lightning.lightning_fixes.plateau import StepOnPlateau
from tl_lightning.lightning_fixes.sigterm import SigtermHandler, ends_together
from tl_lightning.lightning_fixes.step_boundary import StepBoundary, count_steps, finish_epoch
from tl_lightning.modules import checkpoint as checkpoints
from tl_lightning.modules._evaluation import EvaluationMixin
from tl_lightning.modules._frozen_guard import FrozenGuard
from tl_lightning.modules._fsdp import configure_strategy, load_optimizer_state, shard
from tl_lightning.modules._optimization import OptimizationMixin
from tl_lightning.modules._stages import StagesMixin
from tl_lightning.utils.distributed import all_gather_object
from tl_lightning.utils.memory import keep_freed_memory
from tl_lightning.utils.seeding import run_seed, seed_torch
from tl_lightning.utils.serialization import InitArgsMixin


class TransferClassifier(InitArgsMixin, StagesMixin, OptimizationMixin, EvaluationMixin):
    """Train a head on a pre-trained backbone that does not move.

    A subclass for research overrides one of :meth:`build_head`, :meth:`compute_loss`, :meth:`build_metrics`.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.
        lr: Learning rate of the head, per optimizer step.
        optimizer: Makes the optimizer from parameter groups, without a learning rate; None makes AdamW.
        scheduler: Makes the learning-rate schedule from the optimizer; None warms up and follows a cosine, by step.
        scheduler_interval: What the given scheduler counts.

    Raises:
        ValueError: Fewer than two classes, another number of names than classes, a rate that is not above 0, or arguments
            that no checkpoint could bring back.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr is {lr}; it must be above 0 and finite")
        # This layout of convolutions is up to 1.5 times faster: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)
        self.lr = lr
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.left_out: tuple[str, ...] = ()  # of a checkpoint: arguments that it could not bring back
        self.used_lrs, self._resumed_lrs = {}, {}
        self._boundary = StepBoundary()
        checks.check_number(self.num_classes, self.class_names)
        checkpoints.check(self)  # now, not when the first checkpoint is due

        self.rng_state = torch.get_rng_state()
        """From which the head's first weights are drawn, so that others can begin as in its place."""
        self.head = self.build_head(backbone.feature_dim, num_classes)
        self.train_loss = MeanLoss()
        self.build_evaluation()
        self.freeze_policy = FreezePolicy(backbone)

    # Hooks for subclasses -------------------------------------------------------------------------------------------

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the head: (N, ``in_features``) to (N, ``num_classes``)."""
        return LinearHead(in_features, num_classes)

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

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data module, or check them against it.

        Raises:
            ValueError: The data have other classes, or are prepared for another backbone; or no checkpoint could bring this
                classifier back.
        """
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        configure_strategy(self.trainer.strategy, stage)
        if stage == "fit":
            checkpoints.check(self)  # again: parts may have been replaced since
            checks.check_callbacks(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        checks.check_preprocessing(data, self.backbone.preprocessing)
        if stage != "predict":
            self.class_names = checks.class_names(data, self.num_classes, self.class_names)

    def configure_model(self) -> None:
        """Shard what may train, under a ModelParallelStrategy."""
        if self.device_mesh is not None and not any(isinstance(module, FSDPModule) for module in self.modules()):
            shard(self, self.freeze_policy, self.device_mesh)

    def configure_callbacks(self) -> list[Callback]:
        """Guard what is frozen, step a schedule that waits for a plateau, and end on all ranks together: in every run."""
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]  # Lightning's own list
        return [callback() for callback in (FrozenGuard, StepOnPlateau, SigtermHandler) if callback not in present]

    def on_fit_start(self) -> None:
        """Make sure that all ranks go on from the same checkpoint."""
        checks.check_checkpoint(self.trainer)

    def on_train_start(self) -> None:
        """Begin anew, though a fit before may have been interrupted within an epoch, or go on within the one that is resumed."""
        super().on_train_start()
        if self._boundary.resume(self.trainer, self.train_loss):
            self.train_loss.update(torch.zeros((), device=self.device), 0)
            self._log_loss()  # since no batch is left to do it
        count_steps(self.trainer, starts=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw dropout from the place in the run, so that a resumed run draws as an uninterrupted one."""
        count_steps(self.trainer)
        self.freeze_policy.enforce()
        self._boundary.snapshot(self.trainer, self, self.freeze_policy, self.train_loss)
        seed_torch(run_seed(), "step", self.trainer.global_step, batch_idx, self.trainer.global_rank)

    def on_validation_start(self) -> None:
        """Log by the steps behind, though a run was resumed."""
        if self.trainer.state.fn == "fit":
            count_steps(self.trainer)

    def on_train_epoch_end(self) -> None:
        """Log by the steps behind, though a run was resumed, and begin the next epoch anew."""
        super().on_train_epoch_end()
        count_steps(self.trainer)
        self.trainer.fit_loop.epoch_loop.restarting = False  # where no batch was left, nothing else has said so

    def on_validation_end(self) -> None:
        """Look, before training, whether there are the scores that callbacks go by."""
        if self.trainer.sanity_checking:
            checks.check_monitors(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        loss = self.training_loss(batch)
        if not self.train_loss.update_called:  # once an epoch is enough, since it is the metric that adds up
            self._log_loss()
        self.train_loss.update(loss.detach(), len(batch.target))
        return loss

    def _log_loss(self) -> None:
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)

    def training_loss(self, batch: Batch) -> Tensor:
        """Compute the mean loss of a training batch, a scalar."""
        return self.compute_loss(self.forward_from(batch.inputs, batch.boundary), batch.target)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what this classifier is made of, so that the checkpoint is enough to make it again."""
        place: dict[str, Any] = {"total_steps": self.total_steps, "used_lrs": dict(self.used_lrs)}
        if self._trainer is not None:
            loss = self._boundary.rewind(self._trainer, checkpoint, self.train_loss)
            # A run that is interrupted may be so on one rank, which must not wait for the others.
            alone = self._trainer.state.status == TrainerStatus.INTERRUPTED and not ends_together(self._trainer)
            place["train_loss"] = [loss.tolist()] if alone else all_gather_object(loss.tolist())
        checkpoint[checkpoints.KEY] = checkpoints.describe(self, checkpoint["state_dict"]) | place

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where Lightning would go on wrongly.

        Raises:
            ValueError: The checkpoint's optimizer has other groups, since other stages may train.
        """
        if self._trainer is None:
            return
        checks.adopt_data_state(getattr(self.trainer, "datamodule", None), checkpoint)
        if self.trainer.state.fn != "fit":
            return
        place = checkpoint.get(checkpoints.KEY, {})
        self.check_resume(checkpoint.get("optimizer_states", []), place.get("total_steps"), place.get("used_lrs", {}))
        self._boundary.load_state(checkpoint, place.get("train_loss", []))
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for optimizer, saved in zip(self.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                load_optimizer_state(optimizer, saved)
        if self.trainer.max_steps != -1:
            finish_epoch(checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # a checkpoint is enough: it takes no hyperparameters
        cls, checkpoint_path: str | Path, map_location: str | torch.device | None = None
    ) -> Self:
        """Make the classifier of a checkpoint, without a network, a download or another argument.

        Args:
            checkpoint_path: The file.
            map_location: Device of the weights; None takes the CPU.

        Returns:
            The classifier, in eval mode; of the class that was saved, which is this one or a subclass.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no checkpoint of this library, is damaged, was saved by another class, or names classes
                that a checkpoint may not name.
        """
        return checkpoints.load(cls, checkpoint_path, map_location)
