"""Imports go one way, the computing parts are plain torch, and the map of the package is complete."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import tl_lightning

ROOT = Path(__file__).parents[1]

WITHOUT_LIGHTNING = """
import sys
for name in "lightning pytorch_lightning lightning_fabric lightning_utilities torchmetrics jsonargparse".split():
    sys.modules[name] = None
import tl_lightning
from tl_lightning import batch, evaluation, features, freezing, heads, images, optim, transforms
from tl_lightning.utils import console, distributed, hashing, memory, messages, paths, seeding, serialization
from tl_lightning.backbones import EfficientNetLite, TimmBackbone, TorchvisionBackbone
import torch
backbone = TorchvisionBackbone("resnet18", weights=None).eval()
freezing.FreezePolicy(backbone)
print(tuple(heads.LinearHead(backbone.feature_dim, 3)(backbone(torch.zeros(2, 3, 64, 64))).shape))
"""


def test_lower_layers_import_and_run_without_lightning() -> None:
    command = [sys.executable, "-c", WITHOUT_LIGHTNING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603 - our own words
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 3)"


def test_import_contracts_are_kept() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603 - our own words
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_docstring_of_the_package_names_every_part_of_it() -> None:
    parts = {module.name for module in pkgutil.iter_modules(tl_lightning.__path__)} - {"__main__"}
    assert tl_lightning.__doc__ is not None
    assert set(re.findall(r"^- ``(\w+)``: ", tl_lightning.__doc__, re.MULTILINE)) == parts
