"""Print small tables on the terminal."""

import io
import os
import sys
import textwrap
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from tl_lightning.utils.distributed import is_rank_zero
from tl_lightning.utils.paths import short_path

_MIN_WIDTH = 20


def escape_unprintable() -> None:
    """Let characters that the terminal or log file lacks be written as escapes, instead of failing the run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print rows of a name and a value on rank 0, without interpreting any markup in them.

    A value that holds a path stays on one line, so that it can be copied. A path in the current folder is shown
    relative to it.
    """
    if not is_rank_zero():
        return
    escape_unprintable()
    console = Console()
    margin = 2 + max(map(len, rows), default=0) + 2
    console.print(Text(title, style="italic"))
    for name, value in rows.items():
        lines = [short_path(value)] if os.sep in value else _wrap(value, console.width - margin)
        for number, line in enumerate(lines):
            label = f"  {name}" if number == 0 else ""
            console.print(Text.assemble((label.ljust(margin), "cyan"), line), soft_wrap=True)


def _wrap(value: str, width: int) -> list[str]:
    return textwrap.wrap(value, max(width, _MIN_WIDTH), break_on_hyphens=False) or [""]
