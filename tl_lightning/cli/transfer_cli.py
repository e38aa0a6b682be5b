"""The command line: links between backbone, data and model, and defaults."""

import sys
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from tl_lightning.callbacks.model_checkpoint import best_checkpoint_callback, default_checkpoints, reverted
from tl_lightning.cli.arguments import import_modules_of_classes, prepare_arguments
from tl_lightning.cli.checkpoint_option import load_model, read_checkpoint
from tl_lightning.cli.data_checks import check_data_folder
from tl_lightning.cli.defaults import SaveConfig, default_callbacks, default_loggers, default_precision
from tl_lightning.cli.options import (
    MODEL_FROM_CONFIG,
    ON_CACHED_FEATURES,
    PROGRAM,
    SUBCOMMANDS,
    add_pipeline_options,
    finish_parser,
)
from tl_lightning.cli.parser import Parser
from tl_lightning.cli.path_options import expand_path_options
from tl_lightning.cli.resume_checks import check_max_epochs, check_same_model, check_trusted_classes
from tl_lightning.cli.run_folder import create_run_folder, remove_run_folder
from tl_lightning.cli.run_lock import lock_run_folder, unlock_run_folder
from tl_lightning.cli.trainer import TransferTrainer
from tl_lightning.cli.value_checks import check_num_classes, check_values
from tl_lightning.data import images_of
from tl_lightning.lightning_fixes.metrics_log import CSVRowCount
from tl_lightning.lightning_fixes.warning_filters import filter_warnings
from tl_lightning.utils.console import escape_unprintable
from tl_lightning.utils.seeding import DEFAULT_SEED


class TransferCLI(LightningCLI):
    """LightningCLI with a top-level ``backbone``, linked to data and model as far as these follow from it.

    ``fit`` builds the model from the configuration. ``validate``, ``test`` and ``predict`` take model, class names and
    preprocessing from the checkpoint, and only images from the data.

    LightningCLI has no public names for the parts of its parser, so this class overrides ``_add_subcommands``,
    ``_prepare_subcommand_parser`` and ``_parse_ckpt_path``, and reads ``_parser`` and ``_get``
    (``lightning/pytorch/cli.py`` of 2.6). pyproject.toml keeps Lightning below the versions that may rename them.
    """

    has_begun: ClassVar[bool] = False
    """Whether the last run had begun when it failed, so that its command was not wrong."""
    _checkpoint: dict[str, Any] | None = None
    """The content of the given checkpoint, its tensors mapped, until the trainer reads it."""
    _new_folder: Path | None = None
    """The folder that was created for this run."""
    _lock: int | None = None
    """The lock on the folder of a fit."""

    def __init__(self, args: ArgsType = None) -> None:
        filter_warnings()
        escape_unprintable()
        TransferCLI.has_begun = False
        try:
            super().__init__(
                trainer_class=TransferTrainer,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},  # a resumed run continues in its own folder
                trainer_defaults={"max_epochs": 10, "default_root_dir": "runs", "enable_model_summary": False},
                seed_everything_default=DEFAULT_SEED,
                parser_kwargs={name: {"description": text} for name, text in SUBCOMMANDS.items()} | PROGRAM,
                parser_class=Parser,
                args=args,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except BaseException:
            trainer = getattr(self, "trainer", None)  # it is built last
            TransferCLI.has_begun = isinstance(trainer, TransferTrainer) and trainer.has_run_batches()
            if self._new_folder is not None and not (isinstance(trainer, TransferTrainer) and trainer.has_trained()):
                remove_run_folder(self._new_folder)
            raise
        finally:
            unlock_run_folder(self._lock)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with the arguments of its method that are no options."""
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ON_CACHED_FEATURES}

    # Parsing --------------------------------------------------------------------------------------------------------

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add backbone, data, model and trainer, and link them."""
        add_pipeline_options(parser, self._current_subcommand)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def _parse_ckpt_path(self) -> None:
        """Do not look for hyperparameters in the checkpoint, which has none."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Lightning sets the help of the subcommands to the trainer's docstrings.
        for choice in parser._subcommands_action._choices_actions:  # type: ignore[union-attr]  # set by the call above
            choice.help = SUBCOMMANDS[choice.dest]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._current_subcommand = subcommand
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        finish_parser(parser, subcommand)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, which need to name only the classes that differ from the defaults."""
        if args is None:
            args = sys.argv[1:]
        subcommand = next((arg for arg in args if arg in SUBCOMMANDS), "") if isinstance(args, list) else ""
        Parser.command = f"tl-lightning {subcommand}".strip()
        try:
            if isinstance(args, list):
                self.config = parser.parse_args(prepare_arguments(args))
            else:
                self.config = parser.parse_object(args)
            check_values(self.config[self.config["subcommand"]])
            expand_path_options(self.config[self.config["subcommand"]])
        except ValueError as error:
            parser.error(str(error))

    # Building -------------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and look at it, before anything is built or written.

        Raises:
            SystemExit: No checkpoint is given to a command that needs one.
            FileNotFoundError: The file does not exist, no run has such a file, or there is no folder of images.
            ValueError: The file is no checkpoint of this library, or names a class that is not trusted. Or the folder
                of images has no classes.
        """
        path = self._get(self.config, "ckpt_path")
        if path is None and self.subcommand not in MODEL_FROM_CONFIG:
            self._parser(self.subcommand).error(f"{self.subcommand} needs a trained model: add --ckpt_path FILE")
        if path is not None:
            root = Path(self._get(self.config, "trainer").default_root_dir)
            path, self._checkpoint = read_checkpoint(str(path), root, resumes=self.subcommand == "fit")
            self.config[str(self.subcommand)]["ckpt_path"] = path
        import_modules_of_classes(self._get(self.config, "model"), self._get(self.config, "backbone"))
        if self.subcommand not in MODEL_FROM_CONFIG and self._checkpoint is not None:
            check_trusted_classes(path, self._checkpoint)
        check_data_folder(self._get(self.config, "data"), with_classes=self.subcommand in MODEL_FROM_CONFIG)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer, with the model from the configuration or from the checkpoint."""
        own = self._get(self.config, "trainer")
        if isinstance(own.callbacks, Namespace):  # of a callback outside a list, jsonargparse loses the errors
            own.callbacks = [own.callbacks]
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        if self.subcommand in MODEL_FROM_CONFIG:
            self.model = self._get(self.config_init, "model")
            given = self._get(self.config, "model").init_args.get("num_classes")
            check_num_classes(given, self.model.num_classes, self.model.class_names)
            if self._checkpoint is not None:
                path = self._get(self.config, "ckpt_path")
                check_same_model(path, self._checkpoint, self.model)
                check_max_epochs(path, self._checkpoint, self._get(self.config, "trainer").max_epochs)
        else:
            self.model = load_model(self._get(self.config, "ckpt_path"), self.datamodule)
        self._checkpoint = None  # unmaps the file, which Lightning reads next and may replace in place later
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the folder, loggers and callbacks that the user has not chosen."""
        config = self._get(self.config_init, "trainer")
        own = config["callbacks"] or []
        added = default_callbacks(
            str(self.subcommand),
            own,
            progress=config["enable_progress_bar"] is not False,
            writes=not config["fast_dev_run"],
        )
        folder = None
        if self.subcommand == "extract":
            self.save_config_callback = None
        if self.subcommand == "extract" or config["fast_dev_run"]:
            kwargs["logger"] = False  # nothing is written
        elif config["logger"] in (None, True, False):
            folder = self._run_folder(Path(config["default_root_dir"]))
            kwargs["default_root_dir"] = folder
            if config["logger"] is not False:
                kwargs["logger"] = default_loggers(folder)
                added.append(CSVRowCount())
        if self.subcommand != "fit":
            kwargs["enable_checkpointing"] = False
        elif config["enable_checkpointing"] is not False:
            added += default_checkpoints(folder, self.model, own)
        if config["precision"] is None:
            kwargs["precision"] = default_precision(str(config["accelerator"]))
        trainer = super().instantiate_trainer(callbacks=own + added, **kwargs)
        if self.subcommand == "fit" and folder is not None and trainer.is_global_zero:
            self._lock = lock_run_folder(folder)
        return trainer

    def _run_folder(self, root: Path) -> Path:
        """Return the folder of the resumed run, or create one for a new run."""
        path = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and path is not None:
            folder = Path(path).resolve().parent.parent
            if (folder / "config.yaml").is_file():
                return folder
        self._new_folder = create_run_folder(root)
        return self._new_folder

    # Running --------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Check before training that there are test images, if the run is to test afterwards.

        Raises:
            ValueError: There are no test images.
        """
        images = images_of(self.datamodule)
        if self._get(self.config, "test_after_fit") and images is not None:
            self.datamodule.prepare_data()
            images.folder_index.require("test")
            images.check_splits(images.splits)
            self.datamodule.setup("test")

    def after_fit(self) -> None:
        """Test the best checkpoint, or the probe that fine-tuning was reverted to, if the user wants that."""
        if self._get(self.config, "test_after_fit"):
            best = best_checkpoint_callback(self.trainer)
            path = reverted(self.trainer) or (best.best_model_path if best else None)
            self.trainer.test(self.model, self.datamodule, ckpt_path=path or None, weights_only=True, verbose=False)

    def after_sweep(self) -> None:
        """Write the configuration of a fit that trains the winner."""
        text = self._parser("sweep").dump(self.config["sweep"], skip_none=False)
        assert isinstance(self.trainer, TransferTrainer)  # noqa: S101 - set as the trainer class above
        self.trainer.write_winner(yaml.safe_load(text))


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; None takes those of the process.
    """
    TransferCLI(args)
