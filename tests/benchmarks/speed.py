"""What the feature cache is worth: ratios, measured side by side in one run, on an idle machine.

python -m tests.benchmarks.speed
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from tests.benchmarks.plain import BATCH, CUT
from tl_lightning.backbones import EfficientNetLite
from tl_lightning.data import CachedFeaturesDataModule, SolarCellsDataModule
from tl_lightning.heads import Standardize
from tl_lightning.heads.logistic import solve
from tl_lightning.modules import LinearProbe, PartialFineTuning, TransferClassifier

EPOCHS = 30


class Timer(pl.Callback):
    """Seconds of each epoch and of each step."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._begin = self._last = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self._last = now

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs.append(time.perf_counter() - self._begin)


def fit(model: TransferClassifier, data: CachedFeaturesDataModule, epochs: int, **options: Any) -> Timer:
    timer = Timer()
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    pl.Trainer(max_epochs=epochs, callbacks=[timer], **quiet, **options).fit(model, data)
    return timer


def bare_epochs(features: Tensor, target: Tensor, epochs: int) -> list[float]:
    """Seconds of each epoch of a loop over tensors, with the loss and accuracy of the epoch."""
    head = nn.Linear(features.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters())
    accuracy = MulticlassAccuracy(2)
    times = []
    for _ in range(epochs):
        begin = time.perf_counter()
        total = torch.zeros(())
        for index in torch.randperm(len(features)).split(BATCH):  # type: ignore[no-untyped-call]  # torch gives it no types
            scores = head(features[index])
            loss = nn.functional.cross_entropy(scores, target[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            total += loss.detach() * len(index)
            accuracy.update(scores.detach(), target[index])
        float(total), float(accuracy.compute())
        accuracy.reset()
        times.append(time.perf_counter() - begin)
    return times


def solvers(features: Tensor, target: Tensor) -> tuple[float, float]:
    """Seconds of scikit-learn's logistic regression, and of ours, the least of five each."""
    standardize = Standardize(features.shape[1])
    standardize.fit(features)
    standard = standardize.eval()(features)
    theirs, ours = [], []
    for _ in range(5):
        begin = time.perf_counter()
        LogisticRegression(C=1.0, tol=1e-5, max_iter=5000).fit(standard.numpy(), target.numpy())
        theirs.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        solve(standard, target, 2, torch.tensor([1.0]), tolerance=1e-5, max_steps=5000)
        ours.append(time.perf_counter() - begin)
    return min(theirs), min(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain-images", type=int, default=512, help="images of the plain loops")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images = SolarCellsDataModule(num_workers=2, seed=0)
    images.prepare_data()
    command = [sys.executable, "-m", "tests.benchmarks.plain", str(images.root), str(arguments.plain_images)]
    plain = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603

    with tempfile.TemporaryDirectory() as folder:
        backbone = EfficientNetLite()
        data = CachedFeaturesDataModule(images, backbone, cache_dir=folder)
        begin = time.perf_counter()
        timer = fit(LinearProbe(backbone, 2), data, EPOCHS)
        probe = time.perf_counter() - begin
        extraction = probe - sum(timer.epochs)
        train, count = len(images.splits["train"].files), images.contents.num_images
        loader = data.train_dataloader()
        batches = list(loader)
        features = torch.cat([batch.inputs for batch in batches])
        target = torch.cat([batch.target for batch in batches])
        bare = bare_epochs(features, target, 10)
        alone = fit(LinearProbe(backbone, 2), data, 10, limit_val_batches=0)

        tuned = PartialFineTuning(backbone, 2, unfreeze_from=CUT, lr=1e-4)
        steps = fit(tuned, data, 1, limit_train_batches=12, limit_val_batches=0).steps
        sklearn, ours = solvers(features, target)

    rows = [
        ("extraction, images a second", 1 / plain["extraction"], count / extraction),
        (f"probe of {EPOCHS} epochs, s", EPOCHS * train * plain["probe_epoch"], probe),
        ("epoch of the cached probe, s", median(bare), median(alone.epochs[1:])),
        (f"step from {CUT} on, s", plain["fine_tuning_step"], median(steps[2:])),
        ("logistic regression, s", sklearn, ours),
    ]
    print("| | plain loop, bare loop, scikit-learn | here | ratio |\n|---|---|---|---|")
    for name, there, here in rows:
        ratio = here / there if "second" in name else there / here
        print(f"| {name} | {there:.3g} | {here:.3g} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
