"""Heads that are solved for in closed form on the whole feature matrix."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from tl_lightning.backbones import Backbone
from tl_lightning.batch import PADDING, Batch, ImageSource
from tl_lightning.heads import ClosedFormHead, HeadCallable, LogisticRegressionHead
from tl_lightning.lightning_fixes.checks import callbacks_of
from tl_lightning.modules.base import TransferClassifier
from tl_lightning.utils.seeding import derive_seed, run_seed


class FeatureCacheClassifier(TransferClassifier):
    """Solve for a head on the features of all training images at once.

    The heads are converged logistic regression, nearest neighbours and class means.
    A fit is one pass over the training data, whatever ``max_epochs`` is; over
    :class:`tl_lightning.data.CachedFeaturesDataModule` it takes seconds. On several ranks, all solve the same problem.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        head: Class of a :class:`tl_lightning.heads.ClosedFormHead`, or a ``functools.partial`` of one; None takes
            :class:`tl_lightning.heads.LogisticRegressionHead`.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.

    Raises:
        ValueError: The head trains by steps, or see :class:`TransferClassifier`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        head: HeadCallable | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, class_names, head=head or LogisticRegressionHead)
        if not isinstance(self.head, ClosedFormHead):
            raise ValueError(  # noqa: TRY004 - the user's choice is wrong, not a type
                f"{type(self.head).__name__} is trained step by step: use it with CustomHeadClassifier, or choose "
                "LogisticRegressionHead, NearestNeighbourHead or ClassMeanHead"
            )
        self.automatic_optimization = False
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return an optimizer whose only step is the whole solution."""
        return _Solution(self.parameter_groups())

    def setup(self, stage: str) -> None:
        """Limit the fit to one pass.

        Raises:
            ValueError: A callback averages weights, the data has several views of an image, or the precision is not
                single or mixed.
        """
        if stage != "fit":
            return
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageSource) and data.views:
            raise ValueError(
                f"data.views is {data.views}, but the head is solved for on the images without augmentation: leave "
                "views out, or train LinearProbe"
            )
        if str(self.trainer.precision) not in ("32-true", "16-mixed", "bf16-mixed"):
            raise ValueError(
                f"precision is {self.trainer.precision}, but the head is solved for in single precision: use 32-true, "
                "or a mixed precision"
            )
        self.trainer.fit_loop.max_epochs = 1
        self._seen.clear()
        if any(isinstance(callback, WeightAveraging) for callback in callbacks_of(self.trainer)):
            raise ValueError(
                "the head is solved for in one step, so there are no weights to average: leave the callback out"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # there is no loss
        """Collect features, and solve at the last batch."""
        with torch.no_grad():
            features = self.features_from(batch.inputs, batch.boundary)
        self._seen.append((features.float(), batch.target, batch.index))
        if self.trainer.is_last_batch:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)  # noqa: S101 - there is one
            optimizer.step(closure=self._solve)

    def _solve(self) -> None:
        if len(self._seen) != self.trainer.num_training_batches:
            raise ValueError(
                "the fit was resumed within its only pass over the images, and the features of the first part are "
                "lost: start it again, without the checkpoint"
            )
        features, target, index = (self._gather(torch.cat(column)) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        # In the order of the index and without padding: the same matrix on any number of ranks.
        order = index.argsort(stable=True)
        order = order[index[order].diff(prepend=index.new_full((1,), PADDING)) != 0]
        features, target = features[order], target[order]
        assert isinstance(self.head, ClosedFormHead)  # noqa: S101 - checked at construction
        summary = self.head.fit(features, target, derive_seed(run_seed(), "head"))
        if self.trainer.world_size > 1:  # other processors round differently, so all ranks take the head of rank 0
            for tensor in self.head.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.print(f"{type(self.head).__name__}: {summary}")
        with torch.no_grad():
            loss = self.compute_loss(self.head.eval()(features), target)
        self.train_loss.update(loss, len(target))
        self.log_train_loss()

    def _gather(self, rows: Tensor) -> Tensor:
        gathered: Any = self.all_gather(rows)  # (ranks, n, ...), or (n, ...) on one rank
        return gathered.flatten(0, 1) if self.trainer.world_size > 1 else rows


class _Solution(Optimizer):
    """An optimizer with one step, so that the trainer counts it and writes checkpoints."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it returns no loss
        """Solve for the head."""
        closure()
