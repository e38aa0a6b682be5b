"""Small tables on the terminal."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text


@rank_zero_only
def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print rows of a name and a value; what they hold is shown to the letter."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    Console().print(table)
