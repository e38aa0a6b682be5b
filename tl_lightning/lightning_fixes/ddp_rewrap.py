"""Wrap a module in DDP again when parameters are unfrozen.

DDP all-reduces only the parameters that required a gradient when it wrapped the module. Lightning wraps once, so the
ranks diverge silently after an unfreezing (https://github.com/Lightning-AI/pytorch-lightning/issues/20340). Needed for
Lightning 2.6. This file can be deleted when Lightning, or torch, reduces parameters that are unfrozen later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def rewrap_after_unfreezing(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let the block freeze and unfreeze parameters of a module that a strategy has wrapped or sharded."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # until then, parameters() gives temporary views with a requires_grad of their own
    yield
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = module
        strategy.configure_ddp()
