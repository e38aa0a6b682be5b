"""Imports go one way, and what computes is plain torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

BLOCKED = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "jsonargparse"):
    sys.modules[name] = None
import tl_lightning
from tl_lightning import batch, features, freezing, heads, images, optim, transforms
from tl_lightning.utils import seeding
from tl_lightning.utils import serialization
from tl_lightning.utils import memory
from tl_lightning.utils import messages
from tl_lightning.backbones import EfficientNetLite, TimmBackbone, TorchvisionBackbone
import torch
backbone = TorchvisionBackbone("resnet18", weights=None).eval()
freezing.FreezePolicy(backbone)
print(tuple(heads.LinearHead(backbone.feature_dim, 3)(backbone(torch.zeros(2, 3, 64, 64))).shape))
"""


def test_lower_layers_import_and_run_without_lightning() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 3)"


def test_import_contracts() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
