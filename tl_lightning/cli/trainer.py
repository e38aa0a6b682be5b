"""A trainer that can also compute features alone, and compare heads on them."""

from collections.abc import Sequence
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer

from tl_lightning.data.precompute import cached, compute
from tl_lightning.heads import HeadCallable
from tl_lightning.modules import TransferClassifier
from tl_lightning.sweep.candidates import candidates_of
from tl_lightning.sweep.sweep import SweepResult, sweep
from tl_lightning.sweep.winner import configuration_of
from tl_lightning.utils.console import print_table


class TransferTrainer(Trainer):
    """Customize every aspect of training, compute features alone, and compare heads on them."""

    sweep_result: SweepResult | None = None
    """What the last sweep found."""

    def extract(self, model: TransferClassifier, datamodule: LightningDataModule) -> None:
        """Compute and store what training on cached features would compute first, on all ranks.

        Args:
            model: The classifier that would be trained.
            datamodule: A :class:`tl_lightning.data.CachedFeaturesDataModule`.

        Raises:
            TypeError: It is another one.
        """
        data = cached(datamodule, "extract stores what CachedFeaturesDataModule serves")
        compute(self, model, data)
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

        Chosen is, on images that they were not trained on, the simplest of those within a standard error of the best: with
        the fewest parameters, the network's included, then the most weight decay, then the lowest rate. It is written as a checkpoint, and tested once.

        Args:
            model: A LinearProbe, whose head is varied, or a CustomHeadClassifier; the loss is its own.
            datamodule: A :class:`tl_lightning.data.CachedFeaturesDataModule`.
            lr: Learning rates of the head.
            weight_decay: Weight decays, of AdamW.
            heads: Classes of heads; None takes that of the model.
            boundaries: Stages before which the network ends, to find out how much of it is of use: heads are put there, on the
                mean over places. ``head`` is the end of the network, which None takes alone.
            folds: Compare by cross-validation over training and validation images, in so many folds; 0 compares on the
                validation images.

        Raises:
            TypeError: The data module is another one.
            ValueError: The model trains more than a head, or there is nothing to choose among, or nothing to choose by.
        """
        data = cached(datamodule, "sweep compares heads on what CachedFeaturesDataModule serves")
        candidates = candidates_of(model, lr, weight_decay, heads, boundaries)
        self.sweep_result = sweep(self, model, data, candidates, folds=folds, other_head=heads is not None)

    def write_winner(self, configuration: dict[str, Any]) -> None:
        """Write the configuration of a fit that trains what the last sweep has chosen, and say what that is.

        Args:
            configuration: Of the sweep, as read from YAML.
        """
        assert self.sweep_result is not None  # noqa: S101 - it is called after a sweep
        sweep_result = self.sweep_result
        path = sweep_result.checkpoint.parent.parent / "winner.yaml"
        fit = configuration_of(configuration, sweep_result.classifier, sweep_result.candidate)
        if self.is_global_zero:
            path.write_text(yaml.safe_dump(fit, sort_keys=False), encoding="utf-8")
        print_table("chosen", sweep_result.describe() | {"as a fit": str(path)})
