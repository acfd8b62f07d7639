r"""Does it pay on your task? Plain training, importance sampling, and plain training that costs as much as that.

::

    python -m hf_importance.compare train.py --seeds 0 1 2 --output_dir runs/compare --model bert-base-uncased ...

Every seed has four sides: ``plain``; ``importance``; ``short``, plain training with as many steps as ours cost and a
whole schedule in them; and ``small``, plain training with the batch that costs as much. The last two are what the
compute that was saved could have been had by without this package, so the verdict is over the better of them. Where
importance sampling never was on they are ``plain`` itself, and are not run.

The script reads ``ImportanceTrainingArguments`` from its command line (``HfArgumentParser``), trains, evaluates and
ends with ``trainer.save_state()``, as the task scripts in ``examples/`` do; what compare does not know goes to it.
Compute counts an example scored as κ of one trained on, as the run has measured it, else a third.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from transformers import Trainer, TrainerState

from hf_importance.reporting import palette
from hf_importance.reporting.report import PREFIX, evaluated, relative_compute
from hf_importance.reporting.spread import interval, mean_and_spread

SIDES = ("plain", "importance", "short", "small")
SIDES_SAID = "short, small: plain training for as much compute as importance took, by fewer steps or smaller batches."
COLORS = {"plain": palette.PLAIN, "importance": palette.OURS, "short": palette.SHORT, "small": palette.SMALL}
# Columns of the table, with their formats, before the metrics.
OWN = {"steps": ".0f", "batch_size": ".3g", "compute": ".2f", "seconds": ".1f"}
# Names, or last words of names, of metrics that are better where they are lower.
LOWER = {"loss", "error", "perplexity", "wer", "cer", "mse", "rmse", "mae"}


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        side: One of :data:`SIDES`.
        seed: Of the run.
        steps: Optimizer steps.
        batch_size: Examples of a micro-batch.
        compute: In that of ``plain``.
        metrics: What its last evaluation found, by name.
        seconds: Of training.
        steps_on: Steps drawn by importance.
        lowest_cost: The lowest cost of a step at equal noise that was seen, in uniform steps; None where unknown.
    """

    side: str
    seed: int
    steps: int
    batch_size: int
    compute: float
    metrics: dict[str, float]
    seconds: float = 0.0
    steps_on: int = 0
    lowest_cost: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All runs, and what they say; ``print`` shows the table and the verdict.

    Attributes:
        rows: Every run, seed by seed.
        metric: What the verdict goes by, such as ``"eval_accuracy"``.
        greater_is_better: Whether more of it is better.
    """

    rows: list[Row]
    metric: str = "eval_loss"
    greater_is_better: bool = False

    def of(self, side: str, value: Callable[[Row], float] | None = None) -> list[float]:
        """Give a value, by default the metric, of one side's runs, seed by seed."""
        rows = sorted((row for row in self.rows if row.side == side), key=lambda row: row.seed)
        return [row.metrics[self.metric] if value is None else value(row) for row in rows]

    def rival(self) -> str:
        """Name the better of the two plain sides that cost as much as ours."""
        best = max if self.greater_is_better else min
        return best(SIDES[2:], key=lambda side: statistics.fmean(self.of(side)))

    def verdict(self) -> str:
        """Say in one sentence whether importance sampling was worth its compute, with a 95 % interval over seeds."""
        broken = {row.side: None for row in self.rows if not math.isfinite(row.metrics[self.metric])}
        if broken:
            return f"none, since {self.metric} is not a finite number in each run of {', '.join(broken)}."
        if not any(self.of("importance", lambda row: row.steps_on)):
            costs = [row.lowest_cost for row in self.rows if row.lowest_cost is not None]
            cost = f", cost of a step at equal noise never below {min(costs):.2f}" if costs else ""
            if self.of("plain") == self.of("importance"):
                return f"stayed off: identical runs{cost}."
            return f"stayed off{cost}; the runs differ nevertheless, so this machine does not repeat a run exactly."
        rival, sign = self.rival(), 1 if self.greater_is_better else -1
        pairs = zip(self.of("importance"), self.of(rival), strict=True)
        differences = [sign * (ours - theirs) for ours, theirs in pairs]
        mean, half = statistics.fmean(differences), interval(differences)
        compute = statistics.fmean(self.of("importance", lambda row: row.compute))
        how = ("fewer" if compute < 1 else "more") + " steps" if rival == "short" else "batches of another size"
        against = f"than plain training with {how}, at {compute:.0%} of the compute of plain training in full"
        size = f"{self._amount(abs(mean))} {'better' if mean > 0 else 'worse'}"
        if half is None:
            return f"{size} at equal compute {against}; of one seed, so there is no interval."
        spread = f"±{self._amount(half).split()[0]}, 95 % over {len(differences)} seeds"
        if abs(mean) <= half:
            return f"no difference at equal compute: {size} ({spread}) {against}."
        return f"{size} at equal compute ({spread}) {against}."

    def _amount(self, value: float) -> str:
        points = "loss" not in self.metric and all(0 <= found <= 1 for side in SIDES for found in self.of(side))
        return f"{100 * value:.2g} points" if points else f"{value:.2g} of {self.metric.removeprefix('eval_')}"

    def table(self) -> str:
        """Give a line a side: means over the seeds, and their standard deviation where there are several."""
        names = [name for name in self.rows[0].metrics if all(name in row.metrics for row in self.rows)]
        lines = [["", *OWN, *(name.removeprefix("eval_") for name in names)]]
        for side in SIDES:
            own = [statistics.fmean(self.of(side, lambda row, name=name: getattr(row, name))) for name in OWN]
            plain = [f"{value:{form}}" for value, form in zip(own, OWN.values(), strict=True)]
            found = [self.of(side, lambda row, name=name: row.metrics[name]) for name in names]
            lines.append([side, *plain, *map(mean_and_spread, found)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) if n == 0 else text.rjust(width) for n, (text, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        )

    def __str__(self) -> str:
        """Give the table, what its sides are, and the verdict."""
        return f"{self.table()}\n\n{SIDES_SAID}\n\nVerdict, by {self.metric}: {self.verdict()}"

    def write(self, folder: Path) -> list[Path]:
        """Write every run to ``compare.csv``, and where matplotlib is installed the metric against compute."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "compare.csv"]
        flat = [{**vars(row), **row.metrics} for row in self.rows]
        with open(files[0], "w", newline="") as opened:
            writer = csv.DictWriter(opened, [name for name in flat[0] if name != "metrics"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(flat)
        if importlib.util.find_spec("matplotlib"):
            files.append(folder / "compare.png")
            self.draw(files[1])
        return files

    def draw(self, file: Path) -> None:
        """Draw the metric of every run against its compute: towards the left it is cheaper."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 4), layout="constrained")
        axes = figure.subplots()
        for side in SIDES:
            compute, found = self.of(side, lambda row: row.compute), self.of(side)
            axes.plot(compute, found, "o", color=COLORS[side], alpha=0.45, markersize=6, markeredgewidth=0)
            mean = [statistics.fmean(compute)], [statistics.fmean(found)]
            axes.plot(*mean, "D", color=COLORS[side], markersize=9, markeredgecolor="white", label=side)
        axes.set(xlabel="compute (plain training in full: 1)", ylabel=self.metric.removeprefix("eval_"))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=150)


def compare(
    train: Callable[..., Trainer | TrainerState],
    seeds: Sequence[int] = (0, 1, 2),
    metric: str | None = None,
    greater_is_better: bool | None = None,
    output_dir: str | Path = "runs/compare",
) -> Comparison:
    """Run all sides of all seeds, plain and ours first in turn, and compare them.

    Args:
        train: Trains and evaluates once, and gives the trainer or its state. It is called with what a side changes of
            the arguments: ``seed``, ``output_dir``, ``importance_sampling``, and of ``short`` and ``small``
            ``max_steps`` and ``per_device_train_batch_size``.
        seeds: At least one; an interval takes two.
        metric: What the verdict goes by; by default the evaluation's first beside its loss, else that.
        greater_is_better: Whether more of it is better; by default what its name says (``loss``, ``error``, ... less).
        output_dir: Every run gets a folder in it.

    Raises:
        ValueError: A run left no evaluation in its log, or not that metric.
    """
    rows: list[Row] = []

    def run(side: str, seed: int, **changes: Any) -> Row:
        what = ", ".join(f"{name}={value}" for name, value in changes.items())
        print(f"\n=== {side}, seed {seed} (run {len(rows) + 1} of at most {4 * len(seeds)}): {what}", flush=True)
        found = train(seed=seed, output_dir=str(Path(output_dir, f"{side}-{seed}")), **changes)
        rows.append(_row(side, seed, found.state if isinstance(found, Trainer) else found))
        return rows[-1]

    for number, seed in enumerate(seeds):
        pair = {
            side: run(side, seed, importance_sampling=side == "importance")
            for side in SIDES[:2][:: 1 - number % 2 * 2]
        }
        plain, ours = pair["plain"], pair["importance"]
        steps, size = (max(round(whole * ours.compute), 1) for whole in (plain.steps, plain.batch_size))
        cheaper = {"short": {"max_steps": steps}}
        cheaper["small"] = {"max_steps": plain.steps, "per_device_train_batch_size": size}
        for side, same in (("short", steps == plain.steps), ("small", size == plain.batch_size)):
            if same:
                rows.append(replace(plain, side=side))
            else:
                found = run(side, seed, importance_sampling=False, **cheaper[side])
                share = found.steps * found.batch_size / (plain.steps * plain.batch_size)
                rows[-1] = replace(found, compute=share)
    rows.sort(key=lambda row: (row.seed, SIDES.index(row.side)))
    names = list(rows[0].metrics)
    if metric is None:
        metric = next((name for name in names if name != "eval_loss"), "eval_loss")
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    if any(metric not in row.metrics for row in rows):
        raise ValueError(f"The runs were not all evaluated by {metric}, but by {', '.join(names)}.")
    if greater_is_better is None:
        greater_is_better = metric.split("_")[-1] not in LOWER
    return Comparison(rows, metric, greater_is_better)


def _row(side: str, seed: int, state: TrainerState) -> Row:
    metrics = next((evaluated(entry) for entry in reversed(state.log_history) if evaluated(entry)), None)
    if metrics is None:
        raise ValueError(f"The run {side}-{seed} has logged no evaluation: call trainer.evaluate() after train().")
    end = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
    own = {name.removeprefix(PREFIX): value for name, value in end.items() if name.startswith(PREFIX)}
    compute = relative_compute(end) if "examples_scored" in own else 1.0
    size, seconds = state.train_batch_size or 1, end.get("train_runtime", 0.0)
    said = own.get("steps_on", 0), own.get("lowest_cost")
    return Row(side, seed, state.global_step, size, compute, metrics, seconds, *said)


# ---- A script ----


def runner(script: str, forwarded: Sequence[str], reuse: bool = False) -> Callable[..., TrainerState]:
    """Give what runs a script with its own arguments and a side's, in a process of its own; see ``--reuse``."""

    def train(**changes: Any) -> TrainerState:
        file = Path(changes["output_dir"], "trainer_state.json")
        if reuse and file.exists():
            return TrainerState.load_from_json(str(file))
        flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, script, *forwarded, *flags]
        print(f"$ {shlex.join(command)}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            raise RuntimeError(f"the run ended with exit code {code}; what it said stands above")
        if not file.exists():
            raise RuntimeError(f"the run left no {file}: end the script with trainer.save_state()")
        return TrainerState.load_from_json(str(file))

    return train


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(line: Sequence[str] | None = None) -> None:
    """Compare the sides of a script."""
    parser = _Parser("python -m hf_importance.compare", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("script", help="Trains once; the arguments that are not listed here are its own.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--compare_metric", help="By default the evaluation's first beside its loss.")
    parser.add_argument("--reuse", action="store_true", help="Take the runs that the output folder has, as they are.")
    settings, forwarded = parser.parse_known_args(line)
    if not Path(settings.script).is_file():
        parser.error(f"there is no script {settings.script}")
    try:
        train = runner(settings.script, forwarded, settings.reuse)
        found = compare(train, settings.seeds, settings.compare_metric, output_dir=settings.output_dir)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    print(f"\n{found}\n")
    for file in found.write(settings.output_dir):
        print(file)


if __name__ == "__main__":
    main()
