"""Print the stages of networks of many families, and check the cuts.

Run ``python -m tests.benchmarks.stages``, with names of timm models to check these alone. The weights are random and
the images small, so that all networks together take some minutes.
"""

import copy
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from tests.doubles import image_folder
from tests.staged import trainer
from tl_lightning.backbones import TimmBackbone
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule
from tl_lightning.modules import PartialFineTuning

FAMILIES: dict[str, int | None] = {
    "vit_small_patch16_dinov3": 64,
    "naflexvit_base_patch16_gap": 64,
    "xcit_nano_12_p8_224": 64,
    "mvitv2_tiny": 64,
    "hrnet_w18_small": 64,
    "coat_lite_tiny": 64,
    "coat_tiny": 64,
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_dinov2": 56,
    "eva02_tiny_patch14_224": 56,
    "vit_base_patch16_rope_mixed_224": 64,
    "beit_base_patch16_224": 64,
    "cait_xxs24_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 112,
    "hiera_tiny_224": None,
    "mixer_s32_224": 64,
    "levit_128s": None,
    "pit_ti_224": 64,
    "convnextv2_atto": 64,
    "efficientformer_l1": None,
    "resnet18": 64,
    "resnetv2_18": 64,
    "regnety_002": 64,
    "tf_efficientnet_lite0": 64,
    "mobilenetv4_conv_small": 64,
    "densenet121": 64,
    "dla34": 64,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 64,
    "mambaout_femto": 64,
    "poolformer_s12": 64,
    "volo_d1_224": 64,
    "twins_svt_small": 64,
    "tnt_s_patch16_224": 64,
}
"""Smallest models of their families, with the image size; None is the size of the published weights."""

TRAINED = ("vit_small_patch16_dinov3", "naflexvit_base_patch16_gap", "xcit_nano_12_p8_224", "mvitv2_tiny", "resnet18")
"""Networks that are also trained for an epoch on cached activations."""


def inexact_cuts(backbone: TimmBackbone, *, training: bool) -> list[str]:
    """Return the stages before which the two parts do not give the bits of the whole network."""
    images = torch.randn(2, 3, *backbone.preprocessing.crop_shape, generator=torch.Generator().manual_seed(0))
    state = copy.deepcopy(backbone.state_dict())
    outputs = []
    for prefix, suffix in ((torch.nn.Identity(), backbone), *map(backbone.split, backbone.stages)):
        backbone.load_state_dict(state)  # batch norm statistics
        backbone.train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(suffix(prefix(images)))
    backbone.load_state_dict(state)
    return [name for name, output in zip(backbone.stages, outputs[1:], strict=True) if not outputs[0].equal(output)]


def train_from_cache(backbone: TimmBackbone, photos: Path, folder: Path) -> str:
    """Train the later half of the stages for an epoch on cached activations, and return the boundary."""
    model = PartialFineTuning(backbone, 2, unfreeze_from=backbone.stages[len(backbone.stages) // 2], lr=0.01)
    images = ImageFolderDataModule(str(photos), batch_size=4, num_workers=0, val_fraction=0.3)
    data = CachedFeaturesDataModule(images, backbone, cache_dir=str(folder / "cache"))
    before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    trainer(folder, max_epochs=1).fit(model, datamodule=data)
    moved = {name for name, parameter in backbone.named_parameters() if not parameter.equal(before[name])}
    allowed = {
        name for stage in model.freeze_policy.unfreezable for name in model.freeze_policy.stages[stage].parameters
    }
    if not moved or not moved <= allowed:
        raise AssertionError(f"{len(moved)} parameters moved, of {len(allowed)} that may")
    return f"from {model.freeze_policy.boundary}"


def describe(name: str, image_size: int | None, photos: Path, folder: Path) -> str:
    """Return the row of a network."""
    torch.manual_seed(0)
    start = time.perf_counter()
    backbone = TimmBackbone(name, weights=None, image_size=image_size)
    seconds = time.perf_counter() - start
    stages = backbone.stages
    last = backbone.split(stages[-2] if len(stages) > 1 else stages[0])[1]
    share = sum(p.numel() for p in last.parameters()) / sum(p.numel() for p in backbone.parameters())
    inexact = [
        f"{stage} in {'train' if training else 'eval'} mode"
        for training in (False, True)
        for stage in inexact_cuts(backbone, training=training)
    ]
    rates = PartialFineTuning(backbone, 2, unfreeze_from=stages[0]).learning_rates()
    cells = (
        name,
        len(stages),
        f"{share:.0%}",
        ", ".join(inexact) or "all exact",
        len(set(rates.values())) - 1,  # without the head's
        train_from_cache(backbone, photos, folder / name) if name in TRAINED else "",
        f"{seconds:.1f}",
        backbone.single_stage_reason or f"{stages[-2]}, {stages[-1]}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print a table of the networks that are named on the command line, otherwise of all."""
    warnings.filterwarnings("ignore")
    print("| network | stages | last two | cuts | rates of stages | trained | seconds to build | last two stages |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        photos = image_folder(Path(folder) / "photos", {"a": 8, "b": 8})
        for name in sys.argv[1:] or FAMILIES:
            print(describe(name, FAMILIES.get(name), photos, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
