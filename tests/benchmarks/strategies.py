"""Compare the strategies on the images of solar cells, all on the same splits.

    python -m tests.benchmarks.strategies --seeds 0 1 2 3 4

Each run is a call of the command line with the shipped configurations. Runs whose results are in ``results.csv`` are
skipped, so that the comparison can be interrupted and continued.
"""

import argparse
import csv
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from tl_lightning.cli import TransferCLI

CONFIGS = Path(__file__).parents[2] / "configs"
PROBE = [f"--config={CONFIGS / 'quickstart.yaml'}"]
STAGED = [f"--config={CONFIGS / 'solar_cells.yaml'}"]
STRATEGIES = {
    "linear probe": PROBE,
    "custom head: 256 hidden units": [*PROBE, "--model=CustomHeadClassifier", "--model.head=MLPHead"],
    "custom head: 3x3 convolution": [*PROBE, "--model=CustomHeadClassifier", "--model.head=ConvHead"],
    "partial fine-tuning, last two stages": [*STAGED, "--model.unfreeze_from=2", "--trainer.callbacks=[]"],
    "full fine-tuning": [*STAGED, "--model.unfreeze_from=stem", "--trainer.callbacks=[]"],
    "staged unfreezing": STAGED,
}
FIELDS = ("strategy", "seed", "accuracy", "f1", "seconds", "parameters")


def run(strategy: str, seed: int, folder: Path) -> dict[str, str]:
    """Train with a strategy, test the best checkpoint, and return the row of results."""
    start = time.monotonic()
    cli = TransferCLI(
        [
            "fit",
            *STRATEGIES[strategy],
            f"--seed_everything={seed}",
            f"--trainer.default_root_dir={folder / strategy.replace(' ', '_') / str(seed)}",
            "--test_after_fit=true",
        ]
    )
    seconds = time.monotonic() - start
    groups = cli.model.configure_optimizers()["optimizer"].param_groups
    parameters = sum(parameter.numel() for group in groups for parameter in group["params"])
    metrics = [f"{float(cli.trainer.callback_metrics[name]):.4f}" for name in ("test_accuracy", "test_f1")]
    return dict(zip(FIELDS, (strategy, str(seed), *metrics, f"{seconds:.0f}", str(parameters)), strict=True))


def table(rows: list[dict[str, str]]) -> str:
    """Return a table of means over seeds, with the paired difference from the linear probe and its 95 % interval."""
    by_seed: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        by_seed[row["strategy"]][row["seed"]] = row
    lines = [
        "| strategy | accuracy | over the probe, points | macro F1 | seconds | trained parameters | seeds |",
        "|---" * 7 + "|",
    ]
    for strategy in (name for name in STRATEGIES if name in by_seed):
        runs = by_seed[strategy]
        accuracy, f1, seconds = (
            mean(float(r[field]) for r in runs.values()) for field in ("accuracy", "f1", "seconds")
        )
        parameters = int(next(iter(runs.values()))["parameters"])
        difference = interval(
            [
                100 * (float(r["accuracy"]) - float(by_seed["linear probe"][seed]["accuracy"]))
                for seed, r in runs.items()
                if strategy != "linear probe" and seed in by_seed["linear probe"]
            ]
        )
        lines.append(
            f"| {strategy} | {accuracy:.3f} | {difference} | {f1:.3f} | {seconds:.0f} | {parameters:,} | {len(runs)} |"
        )
    return "\n".join(lines)


def interval(differences: list[float]) -> str:
    """Return the mean and its 95 % interval by Student's t distribution, which suits few pairs."""
    if len(differences) < 2:
        return "".join(f"{d:+.1f}" for d in differences)
    half = t.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.1f} ({mean(differences) - half:+.1f} to {mean(differences) + half:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/strategies"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = arguments.folder / "results.csv"
    rows = list(csv.DictReader(results.read_text().splitlines())) if results.is_file() else []
    for seed in arguments.seeds:
        for strategy in arguments.strategies:
            if any((row["strategy"], row["seed"]) == (strategy, str(seed)) for row in rows):
                continue
            rows.append(run(strategy, seed, arguments.folder))
            with results.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
