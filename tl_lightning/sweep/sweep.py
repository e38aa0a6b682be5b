"""Compare heads on cached features, and save the chosen one as a classifier."""

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
from tl_lightning.sweep.candidates import Candidate, HeadInput
from tl_lightning.sweep.report import print_search_result, write_csv
from tl_lightning.sweep.search import LabelledFeatures, SearchResult, check_enough_images, count_epochs, search
from tl_lightning.sweep.winner import build_classifier
from tl_lightning.utils.console import print_table
from tl_lightning.utils.seeding import run_seed

_TRAINING_CALLBACKS = (BaseFinetuning, EarlyStopping, GradientAccumulationScheduler, Timer, WeightAveraging)
_SPLITS = ("train", "val")
_MORE = "give several values of lr, weight_decay, heads or boundaries"


class SweepResult(NamedTuple):
    """The winner of a sweep, and all scores."""

    search: SearchResult
    classifier: TransferClassifier
    """The classifier with the chosen head."""
    checkpoint: Path
    test_accuracy: Interval | None
    """Accuracy on the test images, which had no influence on the choice; None if there are none."""

    @property
    def candidate(self) -> Candidate:
        """The chosen candidate."""
        return self.search.candidates[self.search.chosen]

    def describe(self) -> dict[str, str]:
        """Describe the winner as the rows of a table."""
        options = self.candidate.options
        rows = {"head": self.candidate.name}
        if self.candidate.boundary != HEAD:
            rows["network"] = f"ends before {self.candidate.boundary}"
        rows |= {"lr": f"{options.lr:g}", "weight decay": f"{options.weight_decay:g}"}
        if self.test_accuracy is not None:
            estimate, low, high = self.test_accuracy
            rows["test accuracy"] = f"{estimate:.4f} ({low:.4f} to {high:.4f} at 95 %)"
        else:
            rows["test accuracy"] = "not tested"
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
        trainer: The trainer, which knows the number of epochs and the folder of the run.
        model: The classifier whose head is replaced.
        data: The images with their cached features.
        candidates: The heads to compare, with their options.
        folds: Number of folds of cross-validation; 0 compares on the validation images.
        other_head: Whether the heads were chosen by the user, instead of by the model.

    Raises:
        ValueError: The trainer has an option that a sweep does not support, or the data have several views of an image.
            Or there are too few images to compare, or every head diverged.
    """
    if data.views:
        raise ValueError(f"data.views is {data.views}; sweep trains on one view of each image: leave views out")
    _check_trainer(trainer)
    if len(candidates) == 1:
        print_table("sweep", {"nothing to compare": f"one configuration, {candidates[0].name}; {_MORE}"})
    data.prepare_data()
    train_target, val_target = (torch.tensor(data.splits[split].targets) for split in _SPLITS)
    check_enough_images(train_target, val_target, model.num_classes, folds)
    train, val = _load_features(trainer, model, data, candidates, other_head=other_head)
    result = _search_on_all_ranks(trainer, model, data, candidates, train, val, folds)
    folder = Path(str(trainer.log_dir or trainer.default_root_dir))
    if trainer.is_global_zero:
        write_csv(result, folder / "sweep.csv")
    print_search_result(result, folds)
    if not result.loss.isfinite().any():
        raise ValueError(
            "every head diverged: compare lower learning rates and weight decays, or check the features for huge values"
        )
    classifier = build_classifier(model, candidates[result.chosen], other_head=other_head)
    classifier.head.load_state_dict(result.head.state_dict())
    trainer.validate(classifier, datamodule=data, verbose=False)  # the checkpoint holds this score, as after a fit
    checkpoint = folder / "checkpoints" / "best.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=False)  # with the record of the training images
    test_accuracy = None
    if "test" in data.splits and data.splits["test"].files:
        trainer.test(classifier, datamodule=data, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
        accuracy = trainer.callback_metrics.get("test_accuracy")  # a subclass may have other metrics
        count = len(data.splits["test"].files)
        test_accuracy = None if accuracy is None else wilson_interval(round(float(accuracy) * count), count)
    return SweepResult(result, classifier, checkpoint, test_accuracy)


def _check_trainer(trainer: Trainer) -> None:
    """Refuse options that a fit of the winner would follow, and that the training of heads in a sweep ignores."""
    supported = {
        "fast_dev_run": (trainer.fast_dev_run, False),  # type: ignore[attr-defined]  # set by Lightning, as others here
        "max_steps": (trainer.max_steps, -1),
        "gradient_clip_val": (trainer.gradient_clip_val, None),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "overfit_batches": (trainer.overfit_batches, 0.0),  # type: ignore[attr-defined]
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "limit_val_batches": (trainer.limit_val_batches, 1.0),
        "limit_test_batches": (trainer.limit_test_batches, 1.0),
    }
    if (trainer.max_epochs or 0) < 1:
        raise ValueError(f"max_epochs is {trainer.max_epochs}; sweep trains each head for a number of at least 1")
    # Compared as text, because the limits 1 and 1.0 differ: one batch, and all batches.
    refused = [f"{name} {given}" for name, (given, value) in supported.items() if repr(given) != repr(value)]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    refused += [type(callback).__name__ for callback in callbacks if isinstance(callback, _TRAINING_CALLBACKS)]
    if refused:
        raise ValueError(
            f"sweep trains each head for max_epochs on all images, and does not support {', '.join(refused)}: leave "
            "them out; a fit of its winner.yaml supports them"
        )


def _load_features(
    trainer: Trainer,
    model: TransferClassifier,
    data: CachedFeaturesDataModule,
    candidates: Sequence[Candidate],
    *,
    other_head: bool,
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Compute the inputs of all heads, on all ranks; return those of the training and of the validation images."""
    features: tuple[dict[HeadInput, Tensor], ...] = ({}, {})
    for boundary in dict.fromkeys(candidate.boundary for candidate in candidates):
        members = [candidate for candidate in candidates if candidate.boundary == boundary]
        inputs = list(dict.fromkeys(candidate.head_input for candidate in members))
        classifier = build_classifier(model, members[0], other_head=other_head)
        compute_features(trainer, classifier, data, [head_input.representation for head_input in inputs])
        for loaded, split in zip(features, _SPLITS, strict=True):
            loaded |= {head_input: data.features(split, head_input.representation) for head_input in inputs}
    device = trainer.strategy.root_device
    train, val = (
        LabelledFeatures(loaded, torch.tensor(data.splits[split].targets, device=device))
        for loaded, split in zip(features, _SPLITS, strict=True)
    )
    return train, val


def _search_on_all_ranks(
    trainer: Trainer,
    model: TransferClassifier,
    data: CachedFeaturesDataModule,
    candidates: Sequence[Candidate],
    train: LabelledFeatures,
    val: LabelledFeatures,
    folds: int,
) -> SearchResult:
    """Search on every rank, since heads may communicate between ranks; return the result of rank 0.

    First weights, order and dropout are those of a fit, so that a fit of the winner trains the same head.
    """
    columns = (TextColumn("heads"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    epochs = trainer.max_epochs or 0
    with Progress(*columns, disable=trainer.progress_bar_callback is None or not trainer.is_global_zero) as progress:
        bar = progress.add_task("", total=count_epochs(candidates, epochs=epochs, folds=folds))
        own_result = search(
            candidates,
            train,
            val,
            num_classes=model.num_classes,
            loss=model.compute_loss,
            epochs=epochs,
            make_sampler=lambda count: DistributedBatchSampler(count, data.batch_size, shuffle=True, seed=data.seed),
            seed=run_seed(),
            rng_state=model.rng_state,
            folds=folds,
            on_progress=lambda count: progress.advance(bar, count),
        )
    state = {name: tensor.cpu() for name, tensor in own_result.head.state_dict().items()}
    result, state = trainer.strategy.broadcast((own_result._replace(candidates=(), head=nn.Identity()), state))
    if trainer.is_global_zero:
        return own_result
    candidate = candidates[result.chosen]
    head = candidate.head(train.features[candidate.head_input].shape[1], model.num_classes)
    head.load_state_dict(state)
    return result._replace(candidates=candidates, head=head)
