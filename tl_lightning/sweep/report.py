"""Print the result of a search as a table, and write it as a file."""

import csv
import io
from pathlib import Path

from tl_lightning.sweep.search import SearchResult
from tl_lightning.utils.console import print_table
from tl_lightning.utils.files import write_atomically

_SHOWN = 10


def print_search_result(result: SearchResult, folds: int) -> None:
    """Print the best candidates, the chosen one, and its accuracy with the correction for the selection.

    Args:
        result: The result of a search.
        folds: Number of folds of the cross-validation; 0 if the candidates were compared on validation images.
    """
    rows = _rows(result)
    words = {"head": "{}", "boundary": "boundary {}", "lr": "lr {}", "weight_decay": "decay {}"}
    constant = {key for key in ("head", "boundary") if len({row[key] for row in rows}) == 1}
    shown = {
        ", ".join(text.format(row[key]) for key, text in words.items() if key not in constant): (
            f"{row['accuracy']}, cross-entropy {row['cross_entropy']}"
            + (", chosen: the simplest within one standard error" if row["chosen"] else "")
        )
        for number, row in enumerate(rows)
        if number < _SHOWN or row["chosen"]
    }
    if len(rows) > len(shown):
        shown["others"] = f"{len(rows) - len(shown)}, in sweep.csv"
    estimate, low, high = result.interval
    corrected = "corrected for choosing the best of many" if len(rows) > 1 else "the only one: nothing was compared"
    shown["chosen"] = f"{estimate:.4f} ({low:.4f} to {high:.4f} at 95 %), {corrected}"
    by = f"by {folds}-fold cross-validation" if folds else "on validation images"
    print_table(f"compared: accuracy {by}", shown)


def write_csv(result: SearchResult, path: Path) -> None:
    """Write all candidates as comma-separated values, one a row, the best first.

    Args:
        result: The result of a search.
        path: The file; its folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(result)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _rows(result: SearchResult) -> list[dict[str, str]]:
    """Return one row a candidate, the best first."""
    order = sorted(range(len(result.candidates)), key=lambda n: (-float(result.accuracy[n]), float(result.loss[n])))
    return [
        {
            "head": result.candidates[n].name,
            "boundary": result.candidates[n].boundary,
            "lr": f"{result.candidates[n].options.lr:g}",
            "weight_decay": f"{result.candidates[n].options.weight_decay:g}",
            "accuracy": f"{float(result.accuracy[n]):.4f}",
            "cross_entropy": f"{float(result.loss[n]):.4f}",
            "chosen": "yes" if n == result.chosen else "",
        }
        for n in order
    ]
