"""A trainer that can also compute features without training, and compare heads on them."""

from collections.abc import Sequence
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer

from tl_lightning.data.precompute import compute_features, require_cached_features
from tl_lightning.heads import HeadCallable
from tl_lightning.modules import TransferClassifier
from tl_lightning.sweep.candidates import build_candidates
from tl_lightning.sweep.sweep import SweepResult, sweep
from tl_lightning.sweep.winner import to_fit_config
from tl_lightning.utils.console import print_table
from tl_lightning.utils.files import write_atomically


class TransferTrainer(Trainer):
    """Train as Lightning's trainer does, compute features without training, and compare heads on them."""

    sweep_result: SweepResult | None = None
    """The result of the last sweep."""

    def has_trained(self) -> bool:
        """Return whether training has reached its first batch; other commands leave nothing when they fail."""
        return self.fit_loop.epoch_progress.total.ready > 0

    def has_run_batches(self) -> bool:
        """Return whether a run has reached its first batch; the validation before training does not count."""
        loops = (self.validate_loop, self.test_loop, self.predict_loop)
        return self.has_trained() or any(loop.batch_progress.total.ready > 0 for loop in loops)

    def extract(self, model: TransferClassifier, datamodule: LightningDataModule) -> None:
        """Compute and cache the features that a fit on cached features would compute first, on all ranks.

        Args:
            model: The classifier that the fit would train.
            datamodule: A :class:`tl_lightning.data.CachedFeaturesDataModule`.

        Raises:
            TypeError: The data module serves no cached features.
        """
        data = require_cached_features(datamodule, "extract needs cached features")
        compute_features(self, model, data)
        rows = {"features": data.describe(), "images": f"{data.images.folder_index.num_images:,}, all stored and sound"}
        print_table("extracted", rows | {"folder": str(data.cache.cache_dir)})

    def sweep(
        self,
        model: TransferClassifier,
        datamodule: LightningDataModule,
        lr: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        weight_decay: Sequence[float] = (0.0, 0.1, 1.0, 10.0),
        heads: Sequence[HeadCallable] | None = None,
        boundaries: Sequence[str] | None = None,
        folds: int = 0,
    ) -> None:
        """Train heads at all rates and weight decays on cached features, and choose one by the one-standard-error rule.

        The sweep chooses the simplest of all heads whose score on held-out images is within one standard error of the
        best. The simplest has the fewest parameters, those of the network included, then the largest weight decay, then
        the lowest learning rate. It is written as a checkpoint, and tested once.

        Args:
            model: A LinearProbe, or a CustomHeadClassifier; its loss trains all heads.
            datamodule: A :class:`tl_lightning.data.CachedFeaturesDataModule`.
            lr: Learning rates of the head.
            weight_decay: Weight decays of AdamW.
            heads: Classes of heads; None takes the head of the model.
            boundaries: Stages before which the network is cut, to find the depth that it needs. Heads are put there, on
                the mean over all places. ``head`` is the end of the network, which None takes alone.
            folds: Number of folds for cross-validation over training and validation images; 0 compares on the
                validation images.

        Raises:
            TypeError: The data module serves no cached features.
            ValueError: The model trains more than a head, or there are too few candidates or images to compare.
        """
        data = require_cached_features(datamodule, "sweep needs cached features")
        candidates = build_candidates(model, lr, weight_decay, heads, boundaries)
        self.sweep_result = sweep(self, model, data, candidates, folds=folds, other_head=heads is not None)

    def write_winner(self, configuration: dict[str, Any]) -> None:
        """Write the configuration of a fit that trains the winner of the last sweep, and print the winner.

        Args:
            configuration: The configuration of the sweep, as read from YAML.
        """
        assert self.sweep_result is not None  # noqa: S101 - the command line calls it after a sweep
        result = self.sweep_result
        path = result.checkpoint.parent.parent / "winner.yaml"
        fit = to_fit_config(configuration, result.classifier, result.candidate)
        if self.is_global_zero:
            text = yaml.safe_dump(fit, sort_keys=False)
            write_atomically(path, lambda file: file.write(text.encode()))
        print_table("chosen", result.describe() | {"as a fit": str(path)})
