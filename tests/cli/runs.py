"""Runs of the command line in this process, for the tests of the command line."""

from pathlib import Path

from tl_lightning.cli import main

BACKBONE = "--backbone=tests.doubles.TinyBackbone"
PARTIAL = ("--model=PartialFineTuning", "--model.unfreeze_from=layer2")


def fit(photos: Path, runs: Path, *options: str) -> Path:
    """Fit a linear probe for one epoch, unless the options say otherwise, and return the folder of the newest run."""
    backbone = [] if any(option.startswith("--backbone") for option in options) else [BACKBONE]
    common = [f"--data.root={photos}", "--data.num_workers=0", f"--trainer.default_root_dir={runs}"]
    short = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    main(["fit", *backbone, *common, *short, *options])
    return max(runs.glob("version_*"), key=lambda run: int(run.name.removeprefix("version_")))
