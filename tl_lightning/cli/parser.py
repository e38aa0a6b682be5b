"""Parse arguments, with short errors and short help."""

import sys
from argparse import Action
from typing import Any, ClassVar, NoReturn

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from tl_lightning.cli import errors
from tl_lightning.cli.config_files import set_up_parser

set_up_parser()

_KNOWN = "known subclasses: "


class HelpFormatter(DefaultHelpFormatter):
    """Format help as usual, but for a head list only heads, not the thousand imported subclasses of ``nn.Module``."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        before, _, names = text.partition(_KNOWN)
        classes = names.removesuffix(")").split(", ")
        if "torch.nn.Module" not in classes:
            return text
        heads = [name for name in classes if name.startswith("tl_lightning.heads.") and name.endswith("Head")]
        return f"{before}{_KNOWN}{', '.join(heads)})"


class Parser(LightningArgumentParser):
    """Report a mistake in one message, without the usage of sixty lines that argparse prints before it."""

    command: ClassVar[str] = "tl-lightning"
    """The program and its subcommand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own: dict[str, Any] = {"prog": "tl-lightning", "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **own | kwargs)
        self._parsed_class: type | None = None
        self._given: dict[str, Any] = {}

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> Any:
        """Add the arguments of a class, and note the class for error messages."""
        self._parsed_class = self._parsed_class or theclass
        return super().add_class_arguments(theclass, *args, **kwargs)

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Parse arguments, and note the given options for error messages."""
        if isinstance(args, list):
            pairs = [arg.partition("=") for arg in args if arg.startswith("--")]
            self._given = {option.lstrip("-"): value for option, _, value in pairs}
        return super().parse_args(args, *more, **kwargs)

    def parse_object(self, cfg_obj: Any, *more: Any, **kwargs: Any) -> Any:
        """Parse a configuration, and note the given options for error messages."""
        self._given = dict(vars(cfg_obj) if isinstance(cfg_obj, Namespace) else cfg_obj)
        return super().parse_object(cfg_obj, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake and the option that lists all options, and exit with code 2."""
        parser = getattr(ex, "subcommand_parser", self)
        options = {action.dest for action in parser._actions} - {"help"}
        text, listed = errors.explain(message, self._parsed_class, self._given, options, Parser.command)
        sys.stderr.write(f"tl-lightning: error: {text}\nAll options: {Parser.command} {listed}\n")
        sys.exit(2)
