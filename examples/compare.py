r"""Plain against importance sampling on your own data: a table, a CSV file and a figure to decide by.

Runs one of the four task scripts with and without, seed by seed, one process after the other, each side first in turn,
so that a machine that gets slower is unfair to neither. What follows the task goes to both sides as it is::

    python examples/compare.py text_classification --seeds 0 1 2 --output_dir runs/compare \
        --model bert-base-uncased --dataset rotten_tomatoes --max_steps 500

The plain side is the same script with ``--importance_sampling false``. ``compute`` counts an example scored as what it
cost over one trained on (kappa, where the run has measured it, else a third), and is 1 for the plain side;
``train_runtime`` has the seconds of this machine.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from hf_importance.reporting.report import relative_compute

TASKS = ("image_classification", "text_classification", "token_classification", "language_modeling")
SIDES = {"plain": "false", "importance": "true"}
# Okabe-Ito: told apart by colour-blind readers too.
COLORS = {"plain": "#0072B2", "importance": "#D55E00"}
# Of the machine and the moment, or the same for both sides.
LEFT_OUT = ("_per_second", "epoch", "eval_runtime", "total_flos", "model_preparation_time")


def run(task: str, side: str, seed: int, folder: Path, forwarded: list[str]) -> dict:
    """Train one side with one seed; give its row of the table and, under ``log``, its loss by step."""
    command = [sys.executable, str(Path(__file__).with_name(f"{task}.py")), *forwarded, "--seed", str(seed)]
    subprocess.run([*command, "--output_dir", str(folder), "--importance_sampling", SIDES[side]], check=True)
    found = json.loads((folder / "all_results.json").read_text())
    compute = relative_compute(found) if side == "importance" else 1.0
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    row = {name: value for name, value in found.items() if not name.endswith(LEFT_OUT)}
    return {"side": side, "seed": seed, **row, "compute": compute, "log": [e for e in log if "loss" in e]}


def table(rows: list[dict]) -> list[tuple[str, str, str, str]]:
    """Give name, mean of each side, and mean difference with its standard error over the seeds, as text."""
    lines = []
    for name in rows[0]:
        sides = [[row[name] for row in rows if row["side"] == side and name in row] for side in SIDES]
        if name in ("side", "seed", "log") or len(sides[0]) != len(sides[1]):
            continue
        differences = [ours - plain for plain, ours in zip(*sides, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        means = [f"{statistics.fmean(values):.4g}" for values in sides]
        lines.append((name, *means, f"{statistics.fmean(differences):+.3g} ± {error:.2g}"))
    return lines


def draw(rows: list[dict], metric: str, file: Path) -> None:
    """Draw the training loss against compute, and the metric of every seed, both sides."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for row in rows:
        color, entries = COLORS[row["side"]], row["log"]
        compute = [e["step"] * (relative_compute(e) if "importance/tau" in e else 1) for e in entries]
        left.plot(compute, [e["loss"] for e in entries], color=color, alpha=0.75, linewidth=1.4)
        right.plot(
            list(SIDES).index(row["side"]), row[metric], "o", color=color, markeredgecolor="white", markersize=9
        )
    for seed in {row["seed"] for row in rows}:
        pair = {row["side"]: row[metric] for row in rows if row["seed"] == seed}
        right.plot([0, 1], [pair[side] for side in SIDES], color="0.75", linewidth=1, zorder=0)
    for side, color in COLORS.items():
        left.plot([], [], color=color, label=side)
    left.legend(frameon=False)
    left.set(xlabel="compute (in steps of the plain side)", ylabel="training loss", yscale="log")
    right.set(xlim=(-0.5, 1.5), ylabel=metric.replace("_", " "))
    right.set_xticks([0, 1], list(SIDES))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run all, then print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument(
        "--compare_metric", help="Drawn in the figure; by default the evaluation's first, or its loss."
    )
    settings, forwarded = parser.parse_known_args()
    rows = []
    for number, seed in enumerate(settings.seeds):
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            rows.append(run(settings.task, side, seed, settings.output_dir / f"{side}-{seed}", forwarded))
    rows.sort(key=lambda row: (row["seed"], row["side"] != "plain"))
    names = list(dict.fromkeys(name for row in rows for name in row if name != "log"))
    with open(settings.output_dir / "compare.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{settings.task}, seeds {' '.join(map(str, settings.seeds))}, mean")
    for line in [("", *SIDES, "difference ± standard error"), *table(rows)]:
        print(f"{line[0]:24}{line[1]:>12}{line[2]:>12}   {line[3]}")
    metrics = [name for name in rows[0] if name.startswith("eval_") and name not in ("eval_loss", "eval_samples")]
    draw(rows, settings.compare_metric or [*metrics, "eval_loss"][0], settings.output_dir / "compare.png")
    print(f"\nEvery run: {settings.output_dir / 'compare.csv'}\nFigure:    {settings.output_dir / 'compare.png'}")


if __name__ == "__main__":
    main()
