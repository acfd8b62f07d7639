"""Test error against compute: ours, against the best that plain training does with as much.

    python examples/frontier/frontier.py --data path/to/data --models path/to/models
    python examples/frontier/frontier.py --table docs/frontier.md --figure docs/images/frontier.png

Compute is counted in examples, trained and κ times scored, with κ given, so that a busy machine changes nothing; CPU
seconds stand beside it. Learning rates are chosen for each side by the validation error of seed 0. Each finished run
is a line of ``results.jsonl`` and is not run again, so it can be stopped at any time. ``--quick`` runs a few on a
fiftieth of the data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import panels
import tables
import torch
from datasets import disable_progress_bars
from learners import TASKS
from sides import SIDES, Job, commit, run
from transformers.utils import logging

THIRD, SIXTH, TENTH = 1 / 3, 0.17, 0.1
TUNED_AT = (0.5, 1, 2)  # lengths of plain runs whose learning rate is searched for; others have that of the nearest
# What is run first: (side, values of kappa, budgets; None: the task's own).
ROUNDS: list[list[tuple[str, tuple[float, ...], tuple[float, ...] | None]]] = [
    [
        ("plain", (0,), None),
        ("presample", (THIRD, SIXTH), (1,)),
        ("k=1/2", (THIRD, SIXTH), (1,)),
        ("history", (0,), (1,)),
        ("auto", (THIRD, SIXTH), (1,)),
    ],
    [
        ("k=0", (THIRD, SIXTH), (1,)),
        ("InfoBatch", (0,), (1,)),
    ],
    [
        ("auto, k=1/2", (THIRD, SIXTH), (1,)),
        ("history, k=1/2", (0,), (1,)),
    ],
    [("two phases", (THIRD, SIXTH), (1,)), ("k=1/2 until 0.7", (THIRD, SIXTH), (1,))],
    [
        ("short", (THIRD, SIXTH), (1,)),
        ("small", (THIRD, SIXTH), (1,)),
        ("normalised", (THIRD, SIXTH), (1,)),
    ],
    [(side, (TENTH,), (1,)) for side in ("presample", "k=1/2", "auto")],
    [
        ("auto, k=0", (THIRD, SIXTH), (1,)),
        ("presample", (THIRD, SIXTH), (1.5,)),
        ("k=1/2", (THIRD, SIXTH), (1.5,)),
        ("auto", (THIRD, SIXTH), (1.5,)),
        ("auto, k=1/2", (THIRD, SIXTH), (1.5,)),
        ("k=1/2, authors", (THIRD, SIXTH), (1,)),
        ("k=0, authors", (THIRD, SIXTH), (1,)),
        ("constant time", (THIRD, SIXTH), (1,)),
        ("margin 1", (THIRD, SIXTH), (1,)),
    ],
]
SEEDS = ((0, 1, 2), (3, 4))  # all rounds with the first ones, then with the others


class Store:
    """The finished runs, one a line of a file.

    Args:
        file: Where.
        commits: Of the package, whose runs count; None: all. Plain runs always do.
    """

    def __init__(self, file: Path, commits: tuple[str, ...] | None) -> None:
        self.file, self.commits = file, commits
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            self.rows = [json.loads(line) for line in file.read_text().splitlines()]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Give the runs with these values that count."""
        return [
            row
            for row in self.rows
            if all(row[name] == value for name, value in wanted.items())
            and (self.commits is None or SIDES[row["side"]].settings is None or row["commit"] in self.commits)
        ]

    def add(self, row: dict[str, Any]) -> None:
        """Write a run down."""
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")


def tuned(task: str, side: str, budget: float) -> tuple[str, float, float]:
    """Say of which side, κ and budget the learning rate is searched for that this run has."""
    side = SIDES[side].tuned_as or side
    if side == "plain":
        lengths = [length for length in TUNED_AT if length in TASKS[task].budgets]
        return side, 0.0, min(lengths, key=lambda length: max(length / budget, budget / length))
    return side, THIRD if SIDES[side].scores else 0.0, 1


def best_rate(store: Store, task: str, side: str, budget: float) -> float | None:
    """Give the learning rate with the lowest validation error, and loss where that is the same; None: not run yet.

    Seed 0 decides, or of the rates that were run with the most seeds their mean: a close rival can be given them all.
    """
    side, kappa, length = tuned(task, side, budget)
    grid = set(TASKS[task].rates)
    runs: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for row in store.find(task=task, side=side, kappa=kappa, budget=length):
        if row["rate"] in grid:
            runs[row["rate"]].append((row["validation_error"], row["validation_loss"]))
    if set(runs) != grid:
        return None
    most = max(len(found) for found in runs.values())
    means = {rate: tuple(map(statistics.fmean, zip(*found, strict=True))) for rate, found in runs.items()}
    return min((rate for rate in grid if len(runs[rate]) == most), key=means.__getitem__)


def missing(
    store: Store, rounds: int, tasks: Iterable[str], seeds: tuple[tuple[int, ...], ...], sides: Iterable[str] = SIDES
) -> Iterator[Job]:
    """Give the runs that are not there yet; each has to be added before the next is asked for."""
    for some in seeds:
        for entries in ROUNDS[:rounds]:
            for seed in some:
                for task in tasks:
                    for side, kappas, budgets in [entry for entry in entries if entry[0] in sides]:
                        for budget in budgets or TASKS[task].budgets:
                            for kappa in kappas:
                                yield from _missing(store, task, side, kappa, budget, seed)


def _missing(store: Store, task: str, side: str, kappa: float, budget: float, seed: int) -> Iterator[Job]:
    if SIDES[side].remembers and TASKS[task].epochs * budget <= 1:
        return  # no example is seen twice: it is the plain run, to the last bit
    if best_rate(store, task, side, budget) is None:
        kind, at, length = tuned(task, side, budget)
        for rate in TASKS[task].rates:
            if not store.find(task=task, side=kind, kappa=at, budget=length, rate=rate, seed=0):
                yield Job(task, kind, at, length, rate, 0)
    rate = best_rate(store, task, side, budget)
    assert rate is not None, "A run that was given was not added."
    job = Job(task, side, kappa, budget, rate, seed)
    if side in ("short", "small"):
        yield from _missing(store, task, "presample", kappa, 1, seed)
        rate_of_ours = best_rate(store, task, "presample", 1)
        ours = store.find(task=task, side="presample", kappa=kappa, budget=1, seed=seed, rate=rate_of_ours)
        cost = ours[0]["compute"] / budget
        lengths = {"budget": cost * budget} if side == "short" else {"batch": cost}
        job = Job(**{**vars(job), "kappa": 0.0, "of": kappa, **lengths})
        if store.find(task=task, side=side, of=kappa, seed=seed):
            return
    elif store.find(task=task, side=side, kappa=kappa, budget=budget, rate=rate, seed=seed):
        return
    yield job


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_IMPORTANCE_DATA", "data")))
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("HF_IMPORTANCE_MODELS", "models")))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    parser.add_argument("--rounds", type=int, default=len(ROUNDS), help="Only the first so many groups of sides.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--seeds", nargs="+", type=int, help=f"By default {SEEDS}, all sides with the first ones first."
    )
    parser.add_argument("--same_as", nargs="*", default=[], help="Older commits of the package that change no side.")
    parser.add_argument("--quick", action="store_true", help="A look at whether it runs.")
    parser.add_argument("--table", type=Path, help="Write the tables into this page, and run nothing.")
    parser.add_argument("--figure", type=Path, help="Draw the figure, and run nothing.")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or show what is there."""
    given = arguments()
    if given.table or given.figure:
        store = Store(given.results, None)
        rows = tables.chosen(store, best_rate)
        if given.table:
            tables.write(rows, given.table)
        if given.figure:
            panels.draw(rows, given.figure)
        return
    store = Store(given.results, (commit(), *given.same_as))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    seeds, share = SEEDS if given.seeds is None else (tuple(given.seeds),), 1.0
    if given.quick:
        seeds, share = ((0,),), 0.02
    for job in missing(store, given.rounds, given.tasks, seeds, given.sides):
        row = run(job, given.data, given.models, share)
        store.add(row)
        shown = {name: row[name] for name in ("compute", "on", "seconds", "validation_error", "test_error")}
        print(*vars(job).values(), {name: round(value, 4) for name, value in shown.items()}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
