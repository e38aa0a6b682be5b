"""Measure how much time the feature cache saves, as ratios within one run. Run it on an idle machine.

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
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from tests.benchmarks.plain import BATCH, BOUNDARIES
from tl_lightning.backbones import EfficientNetLite
from tl_lightning.data import CachedFeaturesDataModule, SolarCellsDataModule
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.heads import LinearHead
from tl_lightning.modules import LinearProbe, PartialFineTuning, TransferClassifier
from tl_lightning.sweep.training import HeadOptions, Training, train_head, train_heads_together

EPOCHS = 30


class Timer(pl.Callback):
    """Record the seconds of each epoch and of each step."""

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


def fit(
    model: TransferClassifier, data: CachedFeaturesDataModule, epochs: int, *callbacks: pl.Callback, **options: Any
) -> Timer:
    timer = Timer()
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    pl.Trainer(max_epochs=epochs, callbacks=[timer, *callbacks], **quiet, **options).fit(model, data)
    return timer


class BareLoop(pl.Callback):
    """Run an epoch of a bare loop over tensors after each epoch of a fit, and record its seconds.

    The loop computes the loss and the accuracy of the epoch too.
    """

    def __init__(self, features: Tensor, target: Tensor) -> None:
        self.features, self.target = features, target
        self.head = nn.Linear(features.shape[1], 2)
        self.optimizer = torch.optim.AdamW(self.head.parameters())
        self.accuracy = MulticlassAccuracy(2)
        self.epochs: list[float] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        begin = time.perf_counter()
        total = torch.zeros(())
        for index in torch.randperm(len(self.features)).split(BATCH):  # type: ignore[no-untyped-call]  # torch gives it no types
            logits = self.head(self.features[index])
            loss = cross_entropy(logits, self.target[index])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            self.optimizer.step()
            total += loss.detach() * len(index)
            self.accuracy.update(logits.detach(), self.target[index])
        float(total), float(self.accuracy.compute())
        self.accuracy.reset()
        self.epochs.append(time.perf_counter() - begin)


def fifty_heads(features: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the seconds to train fifty linear heads one by one, extrapolated from five, and all fifty together."""
    order = DistributedBatchSampler(len(target), BATCH, shuffle=True)
    training = Training(features, target, lambda _: (index for index, _ in order.batches()), 3, cross_entropy)
    rates = [
        HeadOptions(lr, decay) for lr in torch.logspace(-4, -1, 10).tolist() for decay in (0.0, 0.01, 0.1, 1.0, 10.0)
    ]
    heads = [LinearHead(features.shape[1], 2, standardize=True) for _ in rates]
    times = []
    for _ in range(2):  # the first pass is a warm-up
        begin = time.perf_counter()
        for head, rate in zip(heads[::10], rates[::10], strict=True):
            train_head(head, rate, training)
        middle = time.perf_counter()
        train_heads_together(heads, rates, training)
        times.append((10 * (middle - begin), time.perf_counter() - middle))
    return times[-1]


def plain_loops(images: SolarCellsDataModule, count: int) -> dict[str, float]:
    """Return the seconds of the plain loops, which run in a process of their own."""
    command = [sys.executable, "-m", "tests.benchmarks.plain", str(images.root), str(count)]
    seconds: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain-images", type=int, default=512, help="number of images for the plain loops")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images = SolarCellsDataModule(num_workers=2, seed=0)
    images.prepare_data()
    plain = [plain_loops(images, arguments.plain_images)]

    with tempfile.TemporaryDirectory() as folder:
        backbone = EfficientNetLite()
        data = CachedFeaturesDataModule(images, backbone, cache_dir=folder)
        begin = time.perf_counter()
        timer = fit(LinearProbe(backbone, 2), data, EPOCHS)
        probe = time.perf_counter() - begin
        extraction = probe - sum(timer.epochs)
        train, count = len(images.splits["train"].files), images.folder_index.num_images
        loader = data.train_dataloader()
        batches = list(loader)
        features = torch.cat([batch.inputs for batch in batches])
        target = torch.cat([batch.target for batch in batches])
        bare = BareLoop(features, target)
        alone = fit(LinearProbe(backbone, 2), data, 2 * EPOCHS, bare, limit_val_batches=0)

        steps = {}
        for boundary in BOUNDARIES:
            tuned = PartialFineTuning(EfficientNetLite(), 2, unfreeze_from=boundary, lr=1e-4)
            steps[boundary] = median(fit(tuned, data, 1, limit_train_batches=24, limit_val_batches=0).steps[2:])
        plain.append(plain_loops(images, arguments.plain_images))  # again, because the machine's speed drifts
        one_by_one, together = fifty_heads(features, target)

    extracting, epoch, *plain_steps = (mean(run[name] for run in plain) for name in plain[0])
    rows = [
        ("extraction, images a second", 1 / extracting, count / extraction),
        (f"probe of {EPOCHS} epochs, s", EPOCHS * train * epoch, probe),
        ("epoch of the cached probe, s", median(bare.epochs[1:]), median(alone.epochs[1:])),
        *(
            (f"step from {name} on, s", seconds, steps[name])
            for name, seconds in zip(BOUNDARIES, plain_steps, strict=True)
        ),
        ("fifty linear heads, three epochs, s", one_by_one, together),
    ]
    print("| | plain loop, bare loop, one by one | here | ratio |\n|---|---|---|---|")
    for name, reference, ours in rows:
        # A rate, and the overhead over a bare loop, are divided by the reference; other times give the speed-up.
        ratio = ours / reference if "second" in name or "epoch of" in name else reference / ours
        print(f"| {name} | {reference:.3g} | {ours:.3g} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
