"""Two processes train, stage by stage, to what one does."""

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

from tests.doubles import TinyBackbone
from tests.ranks import run_on_ranks
from tests.staged import EPOCHS, SCHEDULE, TRAINED, Watch, classifier, images, schedulers, trainer
from tl_lightning.callbacks import FrozenDriftError, StagedUnfreezing
from tl_lightning.data import CachedFeaturesDataModule
from tl_lightning.modules import PartialFineTuning
from tl_lightning.utils.hashing import fingerprint

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "static graph": ({"static_graph": True}, {}),
    "gradients as views of buckets": ({"gradient_as_bucket_view": True}, {}),
    "accumulated over 3 batches": ({}, {"accumulate_grad_batches": 3}),
    "clipped": ({}, {"gradient_clip_val": 0.05}),
    "compiled": ({}, {}),
}


class Gaps(Watch):
    """Note after each epoch how far apart the replicas are, and which wrappers there are."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[float] = []
        self.wrappers: set[weakref.ref[Any]] = set()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        mine = _flat(pl_module)
        others = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            dist.all_gather(others, mine)
            self.gaps.append(max(float((mine - other).abs().max()) for other in others))
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            self.wrappers.add(weakref.ref(trainer.strategy.model))


def _flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def train_all_variants(photos: str, folder: str, world: int) -> dict[str, Any]:
    """Train in float64 with the same global batch on any number of ranks."""
    results = {}
    for name, (ddp, options) in VARIANTS.items():
        watch = Gaps()
        model = classifier(TinyBackbone(chance=0.0))
        data = images(photos, batch_size=4 // world)
        strategy = DDPStrategy(**ddp) if world > 1 else "auto"
        run = trainer(
            folder, StagedUnfreezing(SCHEDULE), watch, devices=world, strategy=strategy, precision="64-true", **options
        )
        run.fit(torch.compile(model, backend="aot_eager") if name == "compiled" else model, data)  # type: ignore[arg-type]
        del strategy
        kept = run.strategy.model if world > 1 else None
        gc.collect()
        results[name] = {
            "weights": _flat(model).tolist(),
            "moved": [sorted(watch.trained[epoch]) for epoch in range(EPOCHS)],
            "gaps": watch.gaps,
            "wrappers": len(watch.wrappers),
            "alive": sum(ref() is not None and ref() is not kept for ref in watch.wrappers),
        }
    return results


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"{world}-ranks")
        arguments = {"photos": str(photos), "folder": str(folder)}
        module = "tests.callbacks.test_staged_ranks"
        found[world] = run_on_ranks(module, "train_all_variants", folder / "out", world=world, **arguments)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_as_one(variant: str, runs: dict[int, list[dict[str, Any]]]) -> None:
    (one,), two = runs[1], runs[2]
    assert two[0][variant]["gaps"] == two[1][variant]["gaps"] == [0.0] * EPOCHS
    for rank in two:
        gap = max(abs(a - b) for a, b in zip(rank[variant]["weights"], one[variant]["weights"], strict=True))
        assert gap <= 1e-12
        assert [tuple(stages) for stages in rank[variant]["moved"]] == TRAINED


def test_old_wrappers_are_freed(runs: dict[int, list[dict[str, Any]]]) -> None:
    for rank in runs[2]:
        assert rank["plain"]["wrappers"] == 4, "one for each change of stage, and that of the start"
        assert rank["plain"]["alive"] == 0


class Rank1(pl.Callback):
    """Change a tensor of one rank alone, within the first stage."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            pl_module.state_dict()[self.name] += 1


def diverge(photos: str, folder: str, world: int) -> list[str]:
    said = []
    for name in ("backbone.model.stem.conv.weight", "head.linear.weight"):
        run = trainer(folder, StagedUnfreezing(SCHEDULE), Rank1(name), devices=world, strategy="ddp")
        with pytest.raises(FrozenDriftError) as caught:
            run.fit(classifier(), images(photos, batch_size=4))
        said.append(f"epoch {run.current_epoch}: {caught.value}")
    return said


def test_ranks_are_compared_before_a_stage_makes_them_equal(photos: Path, tmp_path: Path) -> None:
    for frozen, trained in run_on_ranks(
        __name__, "diverge", tmp_path / "out", photos=str(photos), folder=str(tmp_path)
    ):
        assert frozen.startswith("epoch 1: backbone.model.stem.conv.weight changed while frozen")
        assert trained.startswith("epoch 1: head.linear.weight differs between the 2 ranks")


# Resuming -------------------------------------------------------------------------------------------------------------


def resume_all(photos: str, folder: str, world: int) -> dict[str, dict[str, list[Any]]]:
    """Resume a staged run after every epoch, and with one schedule from every step."""
    results: dict[str, dict[str, list[Any]]] = {}
    for name in schedulers(1):
        place = Path(folder) / name
        results[name] = {"whole": _run(photos, place, world, name)}
        dist.barrier()
        for checkpoint in sorted(place.glob("*.ckpt")):
            results[name][checkpoint.stem] = _run(photos, place, world, name, checkpoint)
    return results


def _run(photos: str, place: Path, world: int, name: str, resume: Path | None = None) -> list[Any]:
    torch.manual_seed(0 if resume is None else 99)
    interval = "step" if name == "OneCycleLR" else "epoch"
    model = classifier(scheduler=schedulers(EPOCHS * 3)[name], scheduler_interval=interval)
    watch = Watch()
    callbacks: list[pl.Callback] = [StagedUnfreezing(SCHEDULE), watch]
    if resume is None:
        callbacks.append(ModelCheckpoint(place, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
        if name == "ours":
            callbacks.append(ModelCheckpoint(place, "step-{step}", save_top_k=-1, every_n_train_steps=1))
    run = trainer(place, *callbacks, devices=world, strategy="ddp", enable_checkpointing=resume is None)
    run.fit(model, images(photos, batch_size=8 // world), ckpt_path=resume, weights_only=True)
    return [fingerprint(model.state_dict()), [list(stages) for stages in watch.trained]]


def test_resumed_on_two_ranks(photos: Path, tmp_path: Path) -> None:
    ranks = run_on_ranks(
        "tests.callbacks.test_staged_ranks",
        "resume_all",
        tmp_path / "out",
        photos=str(photos),
        folder=str(tmp_path / "checkpoints"),
    )
    assert ranks[0] == ranks[1]
    for name, runs in ranks[0].items():
        assert len(runs) == 1 + EPOCHS + (3 * EPOCHS if name == "ours" else 0)
        for checkpoint, result in runs.items():
            assert result[0] == runs["whole"][0], (name, checkpoint)
            assert result[1] == runs["whole"][1][EPOCHS - len(result[1]) :], (name, checkpoint)


# Sharding -------------------------------------------------------------------------------------------------------------


class Double(PartialFineTuning):
    """In float64 by hand, which ModelParallelStrategy does not offer as a precision, and with groups in another order."""

    def forward_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        return super().forward_from(inputs.double(), boundary)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group | {"params": group["params"][::-1]} for group in super().parameter_groups()]


def train_sharded(photos: str, folder: str, world: int) -> list[dict[str, Any]]:
    """Train on two processes that share out the weights, or on one that has them all; then go on from epochs of that."""
    found = []
    for resume in (None, "epoch=1.ckpt", "epoch=2.ckpt") if world > 1 else (None,):
        torch.manual_seed(5)
        model = Double(TinyBackbone(chance=0.0), 3, unfreeze_from="layer1", lr=0.01, backbone_lr=0.005).double()
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if world > 1 else "auto"
        watch = Whole()
        saves = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)] * (resume is None)
        more = {"devices": world, "strategy": strategy, "enable_checkpointing": resume is None}
        ends = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda run, _: _stop_after(run, epoch=2))
        run = trainer(folder, StagedUnfreezing(SCHEDULE), watch, *saves, *([ends] * (resume == "epoch=1.ckpt")), **more)
        path, data = None if resume is None else Path(folder) / resume, images(photos, batch_size=8 // world)
        run.fit(model, data, ckpt_path=path, weights_only=True)
        if resume == "epoch=1.ckpt":  # some of what trains by now has no state in this one
            run.test(model, data, ckpt_path=Path(folder) / "epoch=0.ckpt", weights_only=True, verbose=False)
        epochs = [{n: t.flatten().tolist() for n, t in e.items()} for e in watch.epochs]
        found.append({"epochs": epochs, "sharded": watch.sharded})
    if world > 1:
        for refused, served, message in (
            (classifier(train_bn=True), images(photos), "batch norm that trains would have other statistics"),
            (classifier(), CachedFeaturesDataModule(images(photos), cache_dir=folder), "is sharded over the processes"),
        ):
            strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
            with pytest.raises(ValueError, match=message):
                trainer(folder, devices=world, strategy=strategy).fit(refused, served)
    return found


def _stop_after(run: pl.Trainer, epoch: int) -> None:
    run.should_stop = run.current_epoch == epoch


class Whole(pl.Callback):
    """Note the whole parameters after each epoch."""

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


def test_sharded_training_is_as_one_process(photos: Path, tmp_path: Path) -> None:
    module = "tests.callbacks.test_staged_ranks"
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path / "one")}
    ((one,),) = run_on_ranks(module, "train_sharded", tmp_path / "one", world=1, **arguments)
    arguments["folder"] = str(tmp_path / "two")
    ranks = run_on_ranks(module, "train_sharded", tmp_path / "two", world=2, **arguments)
    sharded = {name.split(".")[2] if name.startswith("backbone") else "head" for name in ranks[0][0]["sharded"]}
    assert sharded == {"head", "layer1", "layer2", "layer3"}, "what never trains stays whole"
    for two, *resumed in ranks:
        for epoch, (given, expected) in enumerate(zip(two["epochs"], one["epochs"], strict=True)):
            for name, values in expected.items():
                assert given[name] == pytest.approx(values, abs=1e-12), (epoch, name)
        assert [run["epochs"] for run in resumed] == [two["epochs"][2:3], two["epochs"][3:]]
    loaded = dict(Double.load_from_checkpoint(tmp_path / "two" / f"epoch={EPOCHS - 1}.ckpt").named_parameters())
    for name, values in ranks[0][0]["epochs"][-1].items():
        whole = pytest.approx(values, rel=1e-6)  # it is made in single precision
        assert loaded[name].flatten().tolist() == whole, "a checkpoint is one file, and enough"
