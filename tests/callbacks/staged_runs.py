"""The training runs of test_staged_ranks, for any number of ranks."""

import gc
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.callbacks.images import images
from tests.doubles import TinyBackbone
from tests.staged import EPOCHS, SCHEDULE, EpochRecorder, classifier, schedulers, trainer
from tl_lightning.callbacks import FrozenDriftError, StagedUnfreezing
from tl_lightning.data import CachedFeaturesDataModule
from tl_lightning.modules import PartialFineTuning
from tl_lightning.utils.hashing import fingerprint

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "static graph": ({"static_graph": True}, {}),
    "gradients as views of buckets": ({"gradient_as_bucket_view": True}, {}),
    "accumulated over 2 batches": ({}, {"accumulate_grad_batches": 2}),
    "clipped": ({}, {"gradient_clip_val": 0.05}),
    "compiled": ({}, {"limit_val_batches": 0}),  # to compile the metrics would take as long again
}


def train(photos: str, folder: str, world: int) -> dict[str, Any]:
    """Do all training of these tests, on any number of ranks."""
    results: dict[str, Any] = {
        "variants": train_variants(photos, folder, world),
        "sharded": train_sharded(photos, f"{folder}/sharded", world),
    }
    if world > 1:
        results["resumed"] = resume_all(photos, f"{folder}/resumed", world)
        results["diverged"] = diverge(photos, folder, world)
    return results


# Against one process --------------------------------------------------------------------------------------------------


class Replicas(EpochRecorder):
    """Note the distance between the replicas after each epoch, and all DDP wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.distances: list[float] = []
        self.wrappers: set[weakref.ref[Any]] = set()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        mine = _flat(pl_module)
        others = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            dist.all_gather(others, mine)
            self.distances.append(max(float((mine - other).abs().max()) for other in others))
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            self.wrappers.add(weakref.ref(trainer.strategy.model))


def _flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def train_variants(photos: str, folder: str, world: int) -> dict[str, Any]:
    """Train in float64, with the same global batch on any number of ranks."""
    results = {}
    for name, (ddp, options) in VARIANTS.items():
        recorder = Replicas()
        model = classifier(TinyBackbone(dropout=0.0))
        data = images(photos, batch_size=4 // world)
        strategy = DDPStrategy(**ddp) if world > 1 else "auto"
        run = trainer(
            folder,
            StagedUnfreezing(SCHEDULE),
            recorder,
            devices=world,
            strategy=strategy,
            precision="64-true",
            **options,
        )
        run.fit(torch.compile(model, backend="aot_eager") if name == "compiled" else model, data)  # type: ignore[arg-type]
        del strategy
        kept = run.strategy.model if world > 1 else None
        gc.collect()
        results[name] = {
            "weights": _flat(model).tolist(),
            "trained": [sorted(stages) for stages in recorder.trained],
            "distances": recorder.distances,
            "wrappers": len(recorder.wrappers),
            "alive": sum(ref() is not None and ref() is not kept for ref in recorder.wrappers),
        }
    return results


# Divergence -----------------------------------------------------------------------------------------------------------


class ChangeOnRank1(pl.Callback):
    """Change a tensor on one rank only, during the first stage."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            pl_module.state_dict()[self.name] += 1


def diverge(photos: str, folder: str, world: int) -> list[str]:
    errors = []
    for name in ("backbone.model.stem.conv.weight", "head.linear.weight"):
        run = trainer(folder, StagedUnfreezing(SCHEDULE), ChangeOnRank1(name), devices=world, strategy="ddp")
        with pytest.raises(FrozenDriftError) as caught:
            run.fit(classifier(), images(photos, batch_size=4 // world))
        errors.append(f"epoch {run.current_epoch}: {caught.value}")
    return errors


# Resuming -------------------------------------------------------------------------------------------------------------

RESUMED = ("default", "StepLR")
"""A scheduler that counts steps and one that counts epochs; test_staged_resume resumes with all kinds."""


def resume_all(photos: str, folder: str, world: int) -> dict[str, dict[str, list[Any]]]:
    """Resume a staged run after every epoch and, with the default scheduler, after every second step."""
    results: dict[str, dict[str, list[Any]]] = {}
    for name in RESUMED:
        place = Path(folder) / name
        results[name] = {"whole": _run(photos, place, world, name)}
        dist.barrier()
        for checkpoint in sorted(place.glob("*.ckpt")):
            results[name][checkpoint.stem] = _run(photos, place, world, name, checkpoint)
    return results


def _run(photos: str, place: Path, world: int, name: str, resume: Path | None = None) -> list[Any]:
    torch.manual_seed(0 if resume is None else 99)
    model = classifier(scheduler=schedulers(EPOCHS * 3)[name])
    recorder = EpochRecorder()
    callbacks: list[pl.Callback] = [StagedUnfreezing(SCHEDULE), recorder]
    if resume is None:
        callbacks.append(ModelCheckpoint(place, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
        if name == "default":
            callbacks.append(ModelCheckpoint(place, "step-{step}", save_top_k=-1, every_n_train_steps=2))
    run = trainer(place, *callbacks, devices=world, strategy="ddp", enable_checkpointing=resume is None)
    run.fit(model, images(photos, batch_size=4 // world), ckpt_path=resume, weights_only=True)
    return [fingerprint(model.state_dict()), [list(stages) for stages in recorder.trained]]


# Sharding -------------------------------------------------------------------------------------------------------------


class Double(PartialFineTuning):
    """Trains in float64, which is no precision of ModelParallelStrategy, and has its parameters in another order."""

    def forward_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        return super().forward_from(inputs.double(), boundary)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group | {"params": group["params"][::-1]} for group in super().parameter_groups()]


def train_sharded(photos: str, folder: str, world: int) -> list[dict[str, Any]]:
    """Train with sharded weights, or whole ones on one process; on two processes, resume from two of the epochs."""
    results = []
    for resume in (None, "epoch=1.ckpt", "epoch=2.ckpt") if world > 1 else (None,):
        torch.manual_seed(5)
        model = Double(TinyBackbone(dropout=0.0), 3, unfreeze_from="layer1", lr=0.01, backbone_lr=0.005).double()
        recorder = WholeParameters()
        saves = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)] * (resume is None)
        more = {"devices": world, "strategy": _sharding(world), "enable_checkpointing": resume is None}
        stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda run, _: _stop_after(run, epoch=2))
        run = trainer(
            folder, StagedUnfreezing(SCHEDULE), recorder, *saves, *([stop] * (resume == "epoch=1.ckpt")), **more
        )
        path, data = None if resume is None else Path(folder) / resume, images(photos, batch_size=4 // world)
        run.fit(model, data, ckpt_path=path, weights_only=True)
        if resume == "epoch=1.ckpt":  # its optimizer has no state for some of the parameters that train by now
            run.test(model, data, ckpt_path=Path(folder) / "epoch=0.ckpt", weights_only=True, verbose=False)
        epochs = [{n: t.flatten().tolist() for n, t in e.items()} for e in recorder.epochs]
        results.append({"epochs": epochs, "sharded": recorder.sharded})
    if world > 1:
        for refused, served, message in (
            (classifier(train_bn=True), images(photos), "each process would have other batch norm statistics"),
            (classifier(), CachedFeaturesDataModule(images(photos), cache_dir=folder), "is sharded over the processes"),
        ):
            with pytest.raises(ValueError, match=message):
                trainer(folder, devices=world, strategy=_sharding(world)).fit(refused, served)
    return results


def _sharding(world: int) -> Any:
    return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if world > 1 else "auto"


def _stop_after(run: pl.Trainer, epoch: int) -> None:
    run.should_stop = run.current_epoch == epoch


class WholeParameters(pl.Callback):
    """Note the unsharded parameters after each epoch, and the names of the sharded ones."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Tensor]] = []
        self.sharded: list[str] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        parameters = dict(pl_module.named_parameters())
        self.sharded = [name for name, p in parameters.items() if isinstance(p, DTensor)]
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}
        self.epochs.append({name: p.detach().clone() for name, p in whole.items()})
