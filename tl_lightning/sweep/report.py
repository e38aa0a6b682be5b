"""What a search found, as a table to look at and as a file."""

import csv
from pathlib import Path

from tl_lightning.sweep.search import SearchResult
from tl_lightning.utils.console import print_table

_SHOWN = 10


def print_found(found: SearchResult, folds: int) -> None:
    """Print the best, what was chosen, and its score without what choosing added.

    Args:
        found: What came out of a search.
        folds: Of the cross-validation that it was compared by; 0 if by validation images.
    """
    rows = _rows(found)
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
    low, high = found.interval.low, found.interval.high
    shown["chosen"] = f"{found.interval.estimate:.4f} ({low:.4f} to {high:.4f} at 95 %) without what choosing added"
    by = f"by {folds}-fold cross-validation" if folds else "on validation images"
    print_table(f"compared: accuracy {by}", shown)


def write_table(found: SearchResult, path: Path) -> None:
    """Write all that was tried, one candidate a row, as comma-separated values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(found)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _rows(found: SearchResult) -> list[dict[str, str]]:
    """Return what was tried, the best first."""
    order = sorted(range(len(found.candidates)), key=lambda n: (-float(found.accuracy[n]), float(found.loss[n])))
    return [
        {
            "head": found.candidates[n].name,
            "boundary": found.candidates[n].before,
            "lr": f"{found.candidates[n].rates.lr:g}",
            "weight_decay": f"{found.candidates[n].rates.weight_decay:g}",
            "accuracy": f"{float(found.accuracy[n]):.4f}",
            "cross_entropy": f"{float(found.loss[n]):.4f}",
            "chosen": "yes" if n == found.chosen else "",
        }
        for n in order
    ]
