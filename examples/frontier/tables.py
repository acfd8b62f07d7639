"""What the results say: tables for the page, the compute multiplier and the verdict."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from learners import TASKS
from sides import SIDES

from hf_importance.reporting import spread
from hf_importance.reporting.markdown import table

MARKS = "<!-- tables -->", "<!-- end of tables -->"
Row = dict[str, Any]


@dataclass
class Point:
    """One side at one length on one task, over seeds.

    Attributes:
        rows: The runs, by their seed.
    """

    task: str
    side: str
    kappa: float
    budget: float
    rows: dict[int, Row] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """Give the mean over seeds."""
        return float(np.mean([row[name] for row in self.rows.values()]))

    def error_of_mean(self, name: str) -> float:
        """Give its standard error."""
        return standard_error([row[name] for row in self.rows.values()])


@dataclass
class Against:
    """A point against plain training.

    Attributes:
        difference: Test error minus that of the best plain run at equal compute, mean over the same seeds.
        deviation: Its standard error.
        loss: The same of the test loss.
        multiplier: Compute of plain training with the same test error over this one's.
        bound: ``"≥ "`` or ``"≤ "`` where no plain run is as good, or as bad, else empty.
        seeds: How many both have.
    """

    difference: float
    deviation: float
    loss: float
    multiplier: float
    bound: str
    seeds: int


def standard_error(values: Iterable[float]) -> float:
    """Give the standard error of a mean; NaN for one value."""
    found = [float(value) for value in values]
    return spread.standard_error(found) if len(found) > 1 else float("nan")


def chosen(store: Any, best_rate: Callable[..., float | None]) -> list[Row]:
    """Give the runs with the learning rates that the validation part chose."""
    return [row for row in store.find() if row["rate"] == best_rate(store, row["task"], row["side"], row["budget"])]


def points(rows: list[Row]) -> list[Point]:
    """Gather runs over their seeds; those that have another's cost stand at their mean."""
    found: dict[tuple, Point] = {}
    for row in rows:
        given = row["of"] or row["kappa"]
        length = 0.0 if row["of"] else row["budget"]
        key = row["task"], row["side"], given, length
        found.setdefault(key, Point(*key)).rows[row["seed"]] = row
    return list(found.values())


def plain_curve(all_points: list[Point], task: str) -> list[Point]:
    """Give the plain runs of a task by their length."""
    return sorted((p for p in all_points if p.task == task and p.side == "plain"), key=lambda p: p.budget)


def against(point: Point, curve: list[Point]) -> Against | None:
    """Hold a point against the plain runs; None where they have no seed in common.

    The best plain run at equal compute is the plain curve there, between its points by the logarithm of compute, or a
    shorter plain run whose validation error is lower.
    """
    seeds = sorted(set(point.rows).intersection(*(set(plain.rows) for plain in curve)))
    if not seeds:
        return None
    compute = float(np.mean([point.rows[seed]["compute"] for seed in seeds]))
    at = np.log([np.mean([plain.rows[seed]["compute"] for seed in seeds]) for plain in curve])

    def on_curve(name: str, place: float) -> np.ndarray:
        return np.array([np.interp(place, at, [plain.rows[seed][name] for plain in curve]) for seed in seeds])

    places = [np.log(compute), *(place for place in at if place < np.log(compute))]
    best = min(places, key=lambda place: on_curve("validation_error", place).mean())

    def differences(name: str) -> np.ndarray:
        return np.array([point.rows[seed][name] for seed in seeds]) - on_curve(name, best)

    error = float(np.mean([point.rows[seed]["test_error"] for seed in seeds]))
    means = np.minimum.accumulate([np.mean([plain.rows[seed]["test_error"] for seed in seeds]) for plain in curve])
    same = float(np.exp(np.interp(-error, -means, at)))
    bound = "≥ " if error < means[-1] else "≤ " if error > means[0] else ""
    found, losses = differences("test_error"), differences("test_loss")
    multiplier = same / compute
    return Against(float(found.mean()), standard_error(found), float(losses.mean()), multiplier, bound, len(seeds))


# ---- Tables ----


def _rank(point: Point) -> tuple:
    return list(SIDES).index(point.side), -point.kappa, point.budget


def _percent(value: float, deviation: float | None = None, sign: str = "") -> str:
    shown = f"{100 * value:{sign}.2f}"
    return shown if deviation is None or math.isnan(deviation) else f"{shown} ± {100 * deviation:.2f}"


def table_of(all_points: list[Point], task: str) -> str:
    """Write the table of a task."""
    curve = plain_curve(all_points, task)
    head = ["", "κ", "steps", "rate", "seeds", "compute", "CPU s", "on", "test error, %", "test loss"]
    head += ["against plain, points", "loss against plain", "multiplier"]
    lines = []
    for point in sorted((p for p in all_points if p.task == task), key=_rank):
        compared = None if point.side == "plain" else against(point, curve)
        cells = [
            point.side,
            f"{point.kappa:.2f}" if point.kappa else "",
            f"{point.mean('steps'):.0f}",
            f"{next(iter(point.rows.values()))['rate']:g}",
            str(len(point.rows)),
            f"{point.mean('compute'):.2f}",
            f"{point.mean('seconds'):.1f}",
            "" if SIDES[point.side].settings is None else f"{100 * point.mean('on'):.0f} %",
            _percent(point.mean("test_error"), point.error_of_mean("test_error")),
            f"{point.mean('test_loss'):.3f}",
        ]
        if compared is None:
            cells += ["", "", ""]
        else:
            cells.append(_percent(compared.difference, compared.deviation, "+"))
            cells += [f"{compared.loss:+.3f}", f"{compared.bound}{compared.multiplier:.2f}"]
        lines.append(cells)
    return f"### {task}\n\n{table(head, lines)}"


def summary(all_points: list[Point]) -> str:
    """Write, a line a side, the multipliers, and on how many tasks it is better and worse."""
    head = ["", "κ", "steps", "tasks", "multiplier where more was expected to help", "where it did"]
    head += ["mean difference, points", "better by 2 se", "worse by 1 se"]
    lines = []
    expected = {name for name, task in TASKS.items() if task.more_helps}
    did = {task for task, (gain, deviation) in doubled(all_points).items() if gain < -2 * deviation}
    groups: dict[tuple, dict[str, Against]] = defaultdict(dict)
    for point in sorted(all_points, key=_rank):
        compared = None if point.side == "plain" else against(point, plain_curve(all_points, point.task))
        if compared is not None and compared.seeds > 1 and not TASKS[point.task].afterwards:
            groups[point.side, point.kappa, point.budget][point.task] = compared
    for (side, kappa, budget), found in groups.items():
        better = [task for task, one in found.items() if one.difference < -2 * one.deviation]
        worse = [task for task, one in found.items() if one.difference > one.deviation]
        cells = [side, f"{kappa:.2f}" if kappa else "", f"{budget:g}" if budget else "", str(len(found))]
        cells += [_multiplier(found, expected), _multiplier(found, did)]
        cells.append(_percent(np.mean([one.difference for one in found.values()]), sign="+"))
        lines.append([*cells, _named(better), _named(worse)])
    return table(head, lines)


def _multiplier(found: dict[str, Against], tasks: set[str]) -> str:
    """Give the geometric mean over some tasks, with the bounds that are in it."""
    some = [one for task, one in found.items() if task in tasks]
    if not some:
        return ""
    bounds = "".join(sorted({one.bound for one in some}))
    return f"{bounds}{np.exp(np.mean([np.log(one.multiplier) for one in some])):.2f} ({len(some)})"


def _named(tasks: list[str]) -> str:
    return f"{len(tasks)}: {'; '.join(tasks)}" if tasks else "0"


def doubled(all_points: list[Point]) -> dict[str, tuple[float, float]]:
    """Give for each task what plain training of twice the base length has less test error, and its standard error."""
    found = {}
    for task in TASKS:
        curve = {point.budget: point.rows for point in plain_curve(all_points, task)}
        if {1, 2} <= set(curve):
            seeds = sorted(set(curve[1]) & set(curve[2]))
            gains = [curve[2][seed]["test_error"] - curve[1][seed]["test_error"] for seed in seeds]
            found[task] = float(np.mean(gains)), standard_error(gains)
    return found


def plain_helped(all_points: list[Point]) -> str:
    """Write what twice the plain compute brings."""
    head = ["", "more was expected to help", "test error of two base runs minus that of one, points"]
    lines = [
        [task, "yes" if TASKS[task].more_helps else "no", _percent(gain, deviation, "+")]
        for task, (gain, deviation) in doubled(all_points).items()
    ]
    return table(head, lines, text=2)


def write(rows: list[Row], page: Path) -> None:
    """Put the tables into a page, between its two marks."""
    found = points(rows)
    tasks = [task for task in TASKS if plain_curve(found, task)]
    made = sorted({(row["commit"], row["torch"], row["transformers"]) for row in rows})
    said = "; ".join(f"commit {one}, torch {two}, transformers {three}" for one, two, three in made)
    text = "\n\n".join(
        [
            f"Made of {len(rows)} runs: {said}.",
            summary(found),
            plain_helped(found),
            *(table_of(found, t) for t in tasks),
        ]
    )
    old = page.read_text()
    pattern = re.compile(f"{MARKS[0]}.*{MARKS[1]}", re.DOTALL)
    if not pattern.search(old):
        raise SystemExit(f"{page} has no place for the tables: {MARKS[0]} and {MARKS[1]}.")
    page.write_text(pattern.sub(lambda _: f"{MARKS[0]}\n\n{text}\n\n{MARKS[1]}", old))
