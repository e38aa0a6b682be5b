"""Declare the options of each subcommand, the links between them, and their help."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from tl_lightning import __version__
from tl_lightning.backbones import Backbone
from tl_lightning.modules import TransferClassifier
from tl_lightning.transforms import Preprocessing

SUBCOMMANDS = {
    "fit": "Train a classifier on a folder of images.",
    "validate": "Score a checkpoint on the validation images.",
    "test": "Score a checkpoint on the test images.",
    "predict": "Write predictions.csv for a folder of images, nested or flat.",
    "extract": "Compute and cache the features that a fit on cached features trains on.",
    "sweep": "Compare heads, learning rates and weight decays on cached features, and keep the best.",
}
"""The subcommands, and their help."""

PROGRAM = {
    "description": "Transfer learning for image classification.",
    "prog": "tl-lightning",
    "version": __version__,
}
"""Arguments of the parser above the subcommands."""

ON_CACHED_FEATURES = ("extract", "sweep")
"""Subcommands that work on cached features."""

MODEL_FROM_CONFIG = ("fit", *ON_CACHED_FEATURES)
"""Subcommands that build the model from the configuration; all others load it from a checkpoint."""

_OPTION_HELP = {
    "config": "Configuration file in YAML or JSON, or the name of a shipped one, as quickstart.",
    "ckpt_path": "Checkpoint file, or 'best' or 'last' of the newest run; fit resumes from the one written last.",
    "weights_only": "Read checkpoints without executing code in them.",
    "trainer.default_root_dir": "Folder for the runs; each run gets a folder version_N in it.",
}
"""Replaces the help from Lightning's docstrings."""

_GROUP_TITLES = {
    "backbone": "The network",
    "data": "The images",
    "model": "The strategy",
    "trainer": "The trainer, which is Lightning's",
}
"""Replaces the titles of option groups, which are beginnings of docstrings; all other such groups are "The run"."""

_KEPT_TITLES = ("positional arguments", "options", "Linked arguments")


def add_pipeline_options(parser: LightningArgumentParser, subcommand: str) -> None:
    """Add backbone, data and model to the parser of a subcommand, and link the values that follow from one another."""
    if subcommand in MODEL_FROM_CONFIG:
        network = "The pre-trained network; by default TorchvisionBackbone with the name resnet50."
        parser.add_subclass_arguments(Backbone, "backbone", required=True, help=network)
    default = "CachedFeaturesDataModule" if subcommand in ON_CACHED_FEATURES else "ImageFolderDataModule"
    images = f"The images; by default {default}."
    parser.add_subclass_arguments(LightningDataModule, "data", required=True, help=images)
    if subcommand in MODEL_FROM_CONFIG:
        strategy = "How the network is trained; by default LinearProbe."
        parser.add_subclass_arguments(TransferClassifier, "model", required=True, help=strategy)
        for key in ("model", "data"):
            parser.link_arguments("backbone", f"{key}.init_args.backbone", apply_on="instantiate")
        parser.link_arguments(
            "backbone", "data.init_args.preprocessing", compute_fn=preprocessing, apply_on="instantiate"
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")
    else:  # the configuration of a fit is valid here too
        trust = "Comes from the checkpoint. Name a class of your own here to let the checkpoint use it."
        for key in ("backbone", "model"):
            parser.add_argument(f"--{key}", type=str | dict | None, default=None, help=trust)


def preprocessing(backbone: Backbone) -> Preprocessing:
    """Return the preprocessing that a backbone needs; the help shows the name of this function."""
    return backbone.preprocessing


def finish_parser(parser: LightningArgumentParser, subcommand: str) -> None:
    """Set help, usage and defaults of a subcommand's parser, and add the options that Lightning does not add.

    Every subcommand accepts all options of fit, so that the configuration of a fit is valid for all of them.
    """
    for action in parser._actions:
        action.help = _OPTION_HELP.get(action.dest, action.help)
    root = "data.images.root" if subcommand in ON_CACHED_FEATURES else "data.root"
    parser.usage = f"tl-lightning {subcommand} [--config FILE] [--{root} FOLDER] [options]"
    for group in parser._action_groups:
        if group.title not in _KEPT_TITLES:
            first = next((action.dest.partition(".")[0] for action in group._group_actions), "")
            group.title = _GROUP_TITLES.get(first, "The run")
    tested = "Test the best checkpoint after training."
    unused: dict[str, Any] = {"type": Any, "default": None, "help": "Not used by this command."}
    parser.add_argument(
        "--test_after_fit", **({"type": bool, "default": False, "help": tested} if subcommand == "fit" else unused)
    )
    if subcommand in ON_CACHED_FEATURES:
        for key in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{key}", **unused)
    else:
        parser.set_defaults(weights_only=True)
    if subcommand == "predict":
        parser.set_defaults(return_predictions=False)
    elif subcommand in ("validate", "test"):
        parser.set_defaults(verbose=False)
