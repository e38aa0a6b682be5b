"""The command line: links between backbone, data and model, and defaults."""

import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from tl_lightning import __version__
from tl_lightning.callbacks import Plan, PredictionWriter, Progress, Summary
from tl_lightning.callbacks.model_checkpoint import best_checkpoint_callback, default_checkpoints, reverted
from tl_lightning.cli.arguments import (
    BUILDING,
    CACHING,
    DESCRIPTIONS,
    add_parts,
    class_paths,
    complete,
    import_module_of,
    name_classes,
)
from tl_lightning.cli.defaults import SaveConfig, default_loggers, default_precision
from tl_lightning.cli.parser import Parser
from tl_lightning.cli.resume_checks import check_known, check_length, check_resumed, check_there
from tl_lightning.cli.run_folder import claim_folder, find_checkpoint, give_back_folder, newest_checkpoint
from tl_lightning.cli.trainer import TransferTrainer
from tl_lightning.data import images_of
from tl_lightning.lightning_fixes.metrics_log import CSVRowCount
from tl_lightning.lightning_fixes.warning_filters import filter_warnings
from tl_lightning.modules import TransferClassifier, checkpoint
from tl_lightning.utils.seeding import DEFAULT_SEED


class TransferCLI(LightningCLI):
    """LightningCLI with a top-level ``backbone``, and with everything that follows from data and backbone linked.

    ``fit`` builds the model from the configuration. ``validate``, ``test`` and ``predict`` take model, classes and
    preprocessing from the checkpoint, and only images from the data.
    """

    _resumed: dict[str, Any] | None = None
    _claimed: Path | None = None

    def __init__(self, args: ArgsType = None) -> None:
        filter_warnings()
        try:
            super().__init__(
                trainer_class=TransferTrainer,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},  # a resumed run goes on in its own folder
                trainer_defaults={"max_epochs": 10, "default_root_dir": "runs", "enable_model_summary": False},
                seed_everything_default=DEFAULT_SEED,
                parser_kwargs={name: {"description": text} for name, text in DESCRIPTIONS.items()}
                | {
                    "description": "Transfer learning for image classification.",
                    "prog": "tl-lightning",
                    "version": __version__,
                },
                parser_class=Parser,
                args=args,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except BaseException:
            if self._claimed is not None and not self._has_begun():
                give_back_folder(self._claimed)
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, and the arguments of their methods that are no options."""
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in CACHING}

    # Parsing --------------------------------------------------------------------------------------------------------

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add backbone, data, model and trainer, and link them."""
        add_parts(parser, self._building)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint to :meth:`before_instantiate_classes`: it holds no hyperparameters, which Lightning looks for."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Lightning puts the Trainer's docstrings there.
        for choice in parser._subcommands_action._choices_actions:  # type: ignore[union-attr]  # made just now
            choice.help = DESCRIPTIONS[choice.dest]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._building = subcommand
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        complete(parser, subcommand)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; without a configuration, they need to name only what is not the default."""
        if args is None:
            args = sys.argv[1:]
        subcommand = next((arg for arg in args if arg in DESCRIPTIONS), "") if isinstance(args, list) else ""
        Parser.command = f"tl-lightning {subcommand}".strip()
        if not isinstance(args, list):
            self.config = parser.parse_object(args)
            return
        try:
            args = name_classes(args)
        except ValueError as error:
            parser.error(str(error))
        self.config = parser.parse_args(args)

    # Building -------------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Find and read the checkpoint, before anything is built or written.

        Raises:
            SystemExit: There is none where nothing is trained.
            FileNotFoundError: The file, or a run that has it, does not exist.
            ValueError: The file is no checkpoint of this library.
        """
        config = self._get(self.config, "trainer")
        path = self._get(self.config, "ckpt_path")
        if path is None and self.subcommand not in BUILDING:
            self._parser(self.subcommand).error("a trained model is needed: add --ckpt_path FILE")
        root = Path(config.default_root_dir)
        if path == "last" and self.subcommand == "fit":
            path, self._resumed = newest_checkpoint(root)
        elif path in ("best", "last"):
            path = find_checkpoint(root, path)
        if path is not None:
            self.config[str(self.subcommand)]["ckpt_path"] = str(path)
            check_there(path)
        if path is not None and self._resumed is None:
            self._resumed = checkpoint.read(path, mmap=True)
        for class_path in class_paths([self._get(self.config, "model"), self._get(self.config, "backbone")]):
            if "." in class_path:  # the user's own configuration may name any class
                import_module_of(class_path)
        if self.subcommand not in BUILDING and self._resumed is not None:
            check_known(path, self._resumed)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; the model from the checkpoint where nothing is trained."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        if self.subcommand in BUILDING:
            self.model = self._get(self.config_init, "model")
            typed = self._get(self.config, "model").init_args.get("num_classes")
            if typed not in (None, self.model.num_classes):
                self._parser(self.subcommand).error(
                    f"model.num_classes is {typed}, and the data have {self.model.num_classes} classes "
                    f"({', '.join(self.model.class_names or ())}); leave it out, since it comes from the data"
                )
            if self._resumed is not None:
                path = self._get(self.config, "ckpt_path")
                check_resumed(path, self._resumed, self.model)
                check_length(path, self._resumed, self._get(self.config, "trainer").max_epochs)
        else:
            self.model = TransferClassifier.load_from_checkpoint(self._get(self.config, "ckpt_path"))
            images = images_of(self.datamodule)
            if images is not None:
                images.preprocessing = self.model.backbone.preprocessing
                if self.model.class_names is not None:
                    images.class_names = self.model.class_names
        self._resumed = None  # unmaps the file, which Lightning reads next and may replace in place later
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the folder, loggers and callbacks that the user has not chosen."""
        config = self._get(self.config_init, "trainer")
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]  # one that is given alone is no list
        # Summary and predictions speak up when the bar has been taken down, so they come after it.
        added: list[Callback] = [Plan()]
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in own):
            added.append(Progress())
        if self.subcommand == "predict":
            added.append(PredictionWriter())
        added.append(Summary())
        folder = None
        if self.subcommand == "extract":
            self.save_config_callback = None
            kwargs["logger"] = False
        elif config["logger"] in (None, True, False) and not config["fast_dev_run"]:
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
        return super().instantiate_trainer(callbacks=own + added, **kwargs)

    def _run_folder(self, root: Path) -> Path:
        """Return the folder of this run: that of the run that is resumed, else a new one."""
        resumed = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and resumed is not None:
            folder = Path(resumed).resolve().parent.parent
            if (folder / "config.yaml").is_file():
                return folder
        self._claimed = claim_folder(root)
        return self._claimed

    def _has_begun(self) -> bool:
        """Return whether training has come to its first batch; what only scores is complete, or it is nothing."""
        trainer = getattr(self, "trainer", None)
        return isinstance(trainer, Trainer) and trainer.fit_loop.epoch_progress.total.ready > 0

    # Running --------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Make sure that there is something to test on when training has ended, if that is asked for.

        Raises:
            ValueError: There are no test images.
        """
        images = images_of(self.datamodule)
        if self._get(self.config, "test_after_fit") and images is not None:
            self.datamodule.prepare_data()
            self.datamodule.setup("test")

    def after_fit(self) -> None:
        """Test the best checkpoint, or the probe that was handed back, if asked for."""
        if self._get(self.config, "test_after_fit"):
            best = best_checkpoint_callback(self.trainer)
            path = reverted(self.trainer) or (best.best_model_path if best else None)
            self.trainer.test(self.model, self.datamodule, ckpt_path=path or None, weights_only=True, verbose=False)

    def after_sweep(self) -> None:
        """Write the configuration of a fit that trains what was chosen."""
        text = self._parser("sweep").dump(self.config["sweep"], skip_none=False)
        assert isinstance(self.trainer, TransferTrainer)  # noqa: S101 - it was made so
        self.trainer.write_winner(yaml.safe_load(text))


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; None takes those of the process.
    """
    TransferCLI(args)
