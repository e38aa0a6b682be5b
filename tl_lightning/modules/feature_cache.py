"""Heads that are solved for on the whole feature matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from tl_lightning.backbones import Backbone
from tl_lightning.batch import PADDING, Batch, ServesViews
from tl_lightning.heads import ClosedFormHead, HeadCallable, LogisticRegressionHead, check_head_factory
from tl_lightning.modules.base import TransferClassifier
from tl_lightning.utils.seeding import derive_seed, run_seed
from tl_lightning.utils.serialization import as_factory


class FeatureCacheClassifier(TransferClassifier):
    """Fit a head to the features of all training images at once: converged logistic regression, nearest neighbours, class means.

    A fit is one pass over the training data, whatever ``max_epochs`` says; over
    :class:`tl_lightning.data.CachedFeaturesDataModule` it takes seconds. On several ranks, all solve the same problem.

    Args:
        backbone: The pre-trained network.
        num_classes: Number K of classes.
        head: Class of a :class:`tl_lightning.heads.ClosedFormHead`, or a ``functools.partial`` of one; None takes
            :class:`tl_lightning.heads.LogisticRegressionHead`.
        class_names: Names of the classes, in the order of their numbers; None takes them from the data module.

    Raises:
        ValueError: The head is none that is fitted, or what :class:`TransferClassifier` raises.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        head: HeadCallable | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_head_factory(head or LogisticRegressionHead)
        self.head_factory = as_factory(head or LogisticRegressionHead) or head or LogisticRegressionHead
        super().__init__(backbone, num_classes, class_names)
        if not isinstance(self.head, ClosedFormHead):
            raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
                f"{type(self.head).__name__} is trained step by step: use it with CustomHeadClassifier, or choose "
                "LogisticRegressionHead, NearestNeighbourHead or ClassMeanHead"
            )
        self.automatic_optimization = False
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def build_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Build the head that was chosen."""
        return self.head_factory(in_features, num_classes)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return what counts as one step of an optimizer: the whole solution."""
        return _Solution(self.parameter_groups())

    def setup(self, stage: str) -> None:
        """Make the run as long as the solution takes.

        Raises:
            ValueError: A callback averages weights, the data have several views of an image, or the network has another precision.
        """
        super().setup(stage)
        if stage != "fit":
            return
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ServesViews) and data.views:
            raise ValueError(
                f"data.views is {data.views}; the head is solved for on the images as they are: leave views out, or train "
                "LinearProbe"
            )
        if str(self.trainer.precision) not in ("32-true", "16-mixed", "bf16-mixed"):
            raise ValueError(
                f"the head is solved for in single precision, and precision is {self.trainer.precision}: use 32-true, or a mixed one"
            )
        self.trainer.fit_loop.max_epochs = 1
        self._seen.clear()
        if any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]  # Lightning's own list
            raise ValueError(
                "the head is solved for in one step, so there is nothing to average: leave the callback out"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # there is no loss to go down
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
                "the fit was resumed within its only pass over the images, whose first part is gone: start it anew, without the "
                "checkpoint"
            )
        features, target, index = (self._from_all(torch.cat(column)) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        # In the order of the index, without what only filled up a batch: the same matrix on any number of ranks.
        order = index.argsort(stable=True)
        order = order[index[order].diff(prepend=index.new_full((1,), PADDING)) != 0]
        features, target = features[order], target[order]
        assert isinstance(self.head, ClosedFormHead)  # noqa: S101 - checked when it was made
        found = self.head.fit(features, target, derive_seed(run_seed(), "head"))
        self.print(f"{type(self.head).__name__}: {found}")
        with torch.no_grad():
            loss = self.compute_loss(self.head.eval()(features), target)
        self.train_loss.update(loss, len(target))
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)

    def _from_all(self, rows: Tensor) -> Tensor:
        gathered: Any = self.all_gather(rows)  # (ranks, n, ...), or (n, ...) on one
        return gathered.flatten(0, 1) if self.trainer.world_size > 1 else rows


class _Solution(Optimizer):
    """One step that leads to the end, so that the trainer counts it and checkpoints are written."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it returns no loss
        """Solve."""
        closure()
