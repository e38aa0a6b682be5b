"""Compare heads on cached features, and write down the one that is chosen."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    Timer,
    WeightAveraging,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from tl_lightning.data import CachedFeaturesDataModule
from tl_lightning.data.precompute import compute_features
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.evaluation import Interval, wilson_interval
from tl_lightning.freezing import HEAD
from tl_lightning.modules import TransferClassifier
from tl_lightning.sweep.candidates import Candidate, Source
from tl_lightning.sweep.report import print_found, write_table
from tl_lightning.sweep.search import LabelledFeatures, SearchResult, check_enough, search, work
from tl_lightning.sweep.winner import classifier_of
from tl_lightning.utils.seeding import run_seed

_OF_TRAINING = (BaseFinetuning, EarlyStopping, GradientAccumulationScheduler, Timer, WeightAveraging)
_SPLITS = ("train", "val")


class SweepResult(NamedTuple):
    """What came out of a sweep."""

    found: SearchResult
    classifier: TransferClassifier
    """With the head that was chosen."""
    checkpoint: Path
    test_accuracy: Interval | None
    """On images that nothing was chosen by; None where there are none."""

    @property
    def candidate(self) -> Candidate:
        """What was chosen."""
        return self.found.candidates[self.found.chosen]

    def describe(self) -> dict[str, str]:
        """Describe what was chosen, a few words a row."""
        rates = self.candidate.rates
        rows = {"head": self.candidate.name}
        if self.candidate.before != HEAD:
            rows["network"] = f"ends before {self.candidate.before}"
        rows |= {"lr": f"{rates.lr:g}", "weight decay": f"{rates.weight_decay:g}"}
        if self.test_accuracy is not None:
            _, low, high = self.test_accuracy
            rows["test accuracy"] = f"{self.test_accuracy.estimate:.4f} ({low:.4f} to {high:.4f} at 95 %)"
        return rows | {"checkpoint": str(self.checkpoint)}


def sweep(
    trainer: Trainer,
    model: TransferClassifier,
    data: CachedFeaturesDataModule,
    candidates: Sequence[Candidate],
    *,
    folds: int,
    other_head: bool,
) -> SweepResult:
    """Train the candidates, choose one, save it, and test it once.

    Args:
        trainer: It says for how many epochs, and where files go.
        model: The classifier whose head is varied.
        data: The images, and where features are stored.
        candidates: What is tried.
        folds: Of cross-validation; 0 compares on the validation images.
        other_head: Whether the candidates' heads are none of the model's own.

    Raises:
        ValueError: The trainer is to do what a sweep does not, the data have several views of an image, or there are too few
            images to choose by.
    """
    if data.views:
        raise ValueError(f"data.views is {data.views}; sweep trains on the images as they are: leave views out")
    _check(trainer)
    data.prepare_data()
    train_target, val_target = (torch.tensor(data.splits[split].targets) for split in _SPLITS)
    check_enough(train_target, val_target, model.num_classes, folds)
    splits = _read(trainer, model, data, candidates, other_head=other_head)
    found = _search(trainer, model, data, candidates, splits, folds)
    folder = Path(str(trainer.log_dir or trainer.default_root_dir))
    if trainer.is_global_zero:
        write_table(found, folder / "sweep.csv")
    print_found(found, folds)
    if not found.loss.isfinite().any():
        raise ValueError("every head diverged: compare lower learning rates and weight decays, or look at the features")
    classifier = classifier_of(model, candidates[found.chosen], other_head=other_head)
    classifier.head.load_state_dict(found.head.state_dict())
    trainer.validate(classifier, datamodule=data, verbose=False)  # the score of what is saved, by the usual way
    checkpoint = folder / "checkpoints" / "best.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=False)  # with what says which images were for training
    tested = None
    if "test" in data.splits:
        trainer.test(classifier, datamodule=data, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
        accuracy = trainer.callback_metrics.get("test_accuracy")  # a subclass may measure something else
        count = len(data.splits["test"].files)
        tested = None if accuracy is None else wilson_interval(round(float(accuracy) * count), count)
    return SweepResult(found, classifier, checkpoint, tested)


def _check(trainer: Trainer) -> None:
    """Refuse what a fit of the winner would do, and its training in the sweep does not."""
    if (trainer.max_epochs or 0) < 1:
        raise ValueError("sweep trains each head for max_epochs, a number of at least 1")
    usual = {
        "fast_dev_run": (trainer.fast_dev_run, False),  # type: ignore[attr-defined]  # Lightning sets it, as others here
        "max_steps": (trainer.max_steps, -1),
        "gradient_clip_val": (trainer.gradient_clip_val, None),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "overfit_batches": (trainer.overfit_batches, 0.0),  # type: ignore[attr-defined]
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "limit_val_batches": (trainer.limit_val_batches, 1.0),
        "limit_test_batches": (trainer.limit_test_batches, 1.0),
    }
    # 1 and 1.0 are not the same: one batch, and all of them
    others = [f"{name} {given}" for name, (given, expected) in usual.items() if repr(given) != repr(expected)]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others += [type(callback).__name__ for callback in callbacks if isinstance(callback, _OF_TRAINING)]
    if others:
        raise ValueError(
            f"sweep trains each head for max_epochs on all images, and knows no {', '.join(others)}: leave them out; a fit of "
            "its winner.yaml takes them"
        )


def _read(
    trainer: Trainer,
    model: TransferClassifier,
    data: CachedFeaturesDataModule,
    candidates: Sequence[Candidate],
    *,
    other_head: bool,
) -> list[LabelledFeatures]:
    """Compute what the candidates take, on all ranks, and return it of the training and of the validation images."""
    features: list[dict[Source, Tensor]] = [{}, {}]
    for before in dict.fromkeys(candidate.before for candidate in candidates):
        here = [candidate for candidate in candidates if candidate.before == before]
        sources = list(dict.fromkeys(candidate.takes for candidate in here))
        compute_features(
            trainer, classifier_of(model, here[0], other_head=other_head), data, [boundary for _, boundary in sources]
        )
        for found, split in zip(features, _SPLITS, strict=True):
            found |= {source: data.features(split, source[1]) for source in sources}
    device = trainer.strategy.root_device
    targets = (torch.tensor(data.splits[split].targets, device=device) for split in _SPLITS)
    return [LabelledFeatures(found, target) for found, target in zip(features, targets, strict=True)]


def _search(
    trainer: Trainer,
    model: TransferClassifier,
    data: CachedFeaturesDataModule,
    candidates: Sequence[Candidate],
    splits: Sequence[LabelledFeatures],
    folds: int,
) -> SearchResult:
    """Search on all ranks alike, since a head may speak to its likes on the others; what the first one finds counts.

    First weights, order and dropout are those of a fit, so that a fit of what is chosen comes out the same.
    """
    train_samples, val_samples = splits
    columns = (TextColumn("heads"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    epochs = trainer.max_epochs or 0
    with Progress(*columns, disable=trainer.progress_bar_callback is None or not trainer.is_global_zero) as progress:
        bar = progress.add_task("", total=work(candidates, epochs=epochs, folds=folds))
        found = search(
            candidates,
            train_samples,
            val_samples,
            num_classes=model.num_classes,
            loss=model.compute_loss,
            epochs=epochs,
            order=lambda count: DistributedBatchSampler(count, data.batch_size, shuffle=True, seed=data.seed),
            seed=run_seed(),
            rng_state=model.rng_state,
            folds=folds,
            advance=lambda count: progress.advance(bar, count),
        )
    state = {name: tensor.cpu() for name, tensor in found.head.state_dict().items()}
    told, state = trainer.strategy.broadcast((found._replace(candidates=(), head=nn.Identity()), state))
    if trainer.is_global_zero:
        return found
    candidate = candidates[told.chosen]
    head = candidate.head(train_samples.features[candidate.takes].shape[1], model.num_classes)
    head.load_state_dict(state)
    return told._replace(candidates=candidates, head=head)
