"""The README's example of a subclass works as it stands, on two ranks and resumed."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.ranks import run_on_ranks
from tests.staged import Watch, images, trainer
from tl_lightning.backbones import TorchvisionBackbone
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.utils.hashing import fingerprint

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def train_example(photos: str, folder: str, world: int) -> dict[str, list[Any]]:
    """Train the subclass and resume it after every epoch."""
    sys.path.insert(0, folder)
    smoothed = importlib.import_module("my_module").Smoothed
    results = {}
    place = Path(folder) / "checkpoints"
    for checkpoint in (None, *(f"epoch-epoch={epoch}.ckpt" for epoch in range(3))):
        torch.manual_seed(1 if checkpoint is None else 99)
        backbone = TorchvisionBackbone("resnet18", weights=None)
        backbone.preprocessing = backbone.preprocessing._replace(size=40, crop=32)
        data = images(photos, batch_size=8 // world, preprocessing=backbone.preprocessing)
        model = smoothed(backbone, num_classes=3, unfreeze_from="layer2", lr=0.01)
        watch = Watch()
        callbacks: list[pl.Callback] = [StagedUnfreezing({1: "layer4", 2: "layer2"}), watch]
        if checkpoint is None:
            callbacks.append(ModelCheckpoint(place, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
        run = trainer(
            folder, *callbacks, devices=world, strategy="ddp", max_epochs=4, enable_checkpointing=checkpoint is None
        )
        resume = None if checkpoint is None else place / checkpoint
        run.fit(model, data, ckpt_path=resume, weights_only=True)
        results[str(checkpoint)] = [fingerprint(model.state_dict()), [list(stages) for stages in watch.trained]]
        if checkpoint is None:
            results["layers"] = [type(module).__name__ for module in model.head]
            again = smoothed.load_from_checkpoint(place / "epoch-epoch=3.ckpt")
            results["loaded"] = [fingerprint(again.state_dict())]
    return results


def test_subclass_with_its_own_head_loss_and_order(photos: Path, tmp_path: Path) -> None:
    module, script = python_blocks()
    assert len([line for line in module.splitlines() if line.startswith("    ")]) <= 10, "ten lines"
    assert "from my_module import Smoothed" in script
    compile(script, "script", "exec")
    (tmp_path / "my_module.py").write_text(module)
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path)}
    ranks = run_on_ranks("tests.test_readme", "train_example", tmp_path / "out", **arguments)
    assert ranks[0] == ranks[1]
    whole = ranks[0]["None"]
    assert whole[1] == [[], ["layer4"], ["layer2", "layer4"], ["layer2", "layer4"]], "layer3 stays as it is"
    assert ranks[0]["layers"] == ["LayerNorm", "Linear"]
    assert ranks[0]["loaded"] == [whole[0]]
    for epoch in range(3):
        resumed = ranks[0][f"epoch-epoch={epoch}.ckpt"]
        assert resumed == [whole[0], whole[1][epoch + 1 :]]
