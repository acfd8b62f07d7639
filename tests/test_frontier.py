"""The bench of error against compute: it runs, stops and goes on, chooses rates by validation, and tables say so."""

import importlib
import json
import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

FRONTIER = Path(__file__).parents[1] / "examples" / "frontier"


@pytest.fixture
def bench(monkeypatch):
    """Give what imports a module of the bench; its tasks have one more, on numbers of four classes."""
    monkeypatch.syspath_prepend(str(FRONTIER))
    data, learners = importlib.import_module("data"), importlib.import_module("learners")

    def load(folder, models):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(15_000, 8, generator=generator)
        labels = inputs[:, :4].argmax(1)
        examples = data.Examples({"inputs": inputs, "labels": labels})
        return data.split(examples, examples.part(12_000, 13_000), 10_000, 2_000, classes=4)

    def model(parts):
        return learners.Classifier(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, parts.classes)))

    toy = learners.Task(True, load, model, 32, 10, (1e-3, 1e-2, 3e-2), budgets=(0.5, 1, 2))
    monkeypatch.setitem(learners.TASKS, "toy", toy)
    return importlib.import_module


def result(job, error, **others):
    """Give a made-up row of results."""
    found = {"compute": job.budget * job.batch, "steps": 100, "on": 0.5, "seconds": 1.0, "commit": "made up"}
    losses = {f"{part}_{kind}": error for part in ("validation", "test") for kind in ("error", "loss")}
    return {**asdict(job), **found, **losses, "torch": "2", "transformers": "5", **others}


def test_a_quick_run_goes_on_where_it_stopped_and_is_shown(bench, monkeypatch, tmp_path):
    results, page, figure = tmp_path / "results.jsonl", tmp_path / "page.md", tmp_path / "figure.png"
    page.write_text("Before.\n<!-- tables -->\nold\n<!-- end of tables -->\nBehind.\n")

    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["frontier.py", "--results", str(results), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FRONTIER / "frontier.py"), run_name="__main__")
        assert not ended.value.code

    script("--quick", "--rounds", 1, "--tasks", "toy")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    keys = [tuple(row[name] for name in ("side", "kappa", "budget", "rate", "seed")) for row in rows]
    assert len(set(keys)) == len(keys) == 9 + 2 * (3 + 1) + 3 + 3 + 1
    for row in rows:
        # Counted in examples, and plain training of budget 1 is the unit.
        assert row["compute"] == pytest.approx((row["trained"] + row["kappa"] * row["scored"]) / (80 * 32))
        assert row["kappa"] > 0 or row["scored"] == 0
        if row["side"] == "plain":
            assert row["compute"] == row["budget"]
    assert any(row["on"] > 0 and row["compute"] < 1 for row in rows if row["side"] == "presample")

    kept = rows[:5] + rows[6:]
    results.write_text("".join(json.dumps(row) + "\n" for row in kept))
    script("--quick", "--rounds", 1, "--tasks", "toy")
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert again[:-1] == kept
    assert {**again[-1], "seconds": 0} == {**rows[5], "seconds": 0}  # as it was, to the last bit

    script("--table", page, "--figure", figure)
    text = page.read_text()
    assert text.startswith("Before.\n<!-- tables -->") and text.endswith("<!-- end of tables -->\nBehind.\n")
    assert "old" not in text and "### toy" in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_rates_are_chosen_by_validation_and_short_costs_what_presampling_does(bench, tmp_path):
    frontier = bench("frontier")
    store = frontier.Store(tmp_path / "results.jsonl", ("made up",))
    best = {"plain": 1e-2, "presample": 3e-2}
    cost = {(kappa, seed): 0.5 + kappa / 4 + seed / 100 for kappa in (1 / 3, 0.17) for seed in (0, 1)}
    jobs = []
    for job in frontier.missing(store, 5, ["toy"], ((0, 1),)):
        jobs.append(job)
        error = 0.1 + abs(math.log(job.rate / best.get(job.side, 1e-3)))
        compute = job.budget * job.batch * (cost[job.kappa, job.seed] if job.side == "presample" else 1)
        # The test error says the opposite.
        store.add(result(job, error, compute=compute, test_error=1 - error))
    assert len(set(jobs)) == len(jobs)
    of_seed_1 = [job for job in jobs if job.seed == 1]
    assert {job.rate for job in of_seed_1 if job.side in ("plain", "short", "small")} == {1e-2}
    assert {job.rate for job in of_seed_1 if job.side == "presample"} == {3e-2}
    assert {job.rate for job in of_seed_1 if job.side == "k=0"} == {1e-3}
    for job in of_seed_1:
        if job.side == "short":
            assert (job.budget, job.batch) == (pytest.approx(cost[job.of, 1]), 1)
        if job.side == "small":
            assert (job.budget, job.batch) == (1, pytest.approx(cost[job.of, 1]))
    # All is there: with another commit of the package only the plain runs are.
    assert not list(frontier.missing(frontier.Store(store.file, ("made up",)), 5, ["toy"], ((0, 1),)))
    other = frontier.Store(store.file, ("another",))
    assert {row["side"] for row in other.find()} == {"plain", "short", "small"}
    assert next(frontier.missing(other, 5, ["toy"], ((0, 1),))).side == "presample"


def test_a_close_rate_that_is_given_all_seeds_is_judged_by_them(bench, tmp_path):
    frontier = bench("frontier")
    store = frontier.Store(tmp_path / "results.jsonl", ())

    def add(rate, seed, error):
        store.add(result(frontier.Job("toy", "plain", 0.0, 1, rate, seed), error))
        return frontier.best_rate(store, "toy", "plain", 1)

    assert add(1e-3, 0, 0.5) is None and add(1e-2, 0, 0.10) is None
    assert add(3e-2, 0, 0.12) == 1e-2
    assert add(1e-2, 1, 0.30) == 1e-2  # no other has as many
    assert add(3e-2, 1, 0.12) == 3e-2


@pytest.mark.parametrize(
    ("reached", "multiplier", "bound"), [(1.0, 2.0, ""), (0.9, 1.8, ""), (5.0, 4.0, "≥ "), (0.1, 1.0, "≤ ")]
)
def test_the_multiplier_is_the_plain_compute_of_the_same_error_over_ours(bench, reached, multiplier, bound):
    tables, sides = bench("tables"), bench("sides")

    def error(compute, seed):
        return 0.3 - 0.1 * math.log(compute) + seed / 100

    rows = [
        result(sides.Job("toy", "plain", 0.0, budget, 1e-2, seed), error(budget, seed))
        for budget in (0.5, 1, 2)
        for seed in (0, 1, 2)
    ]
    # Ours costs half a base run; its seeds differ from plain's by the same but for one.
    rows += [
        result(sides.Job("toy", "presample", 0.17, 1, 1e-2, seed), error(reached, seed) + (seed - 1) / 50, compute=0.5)
        for seed in (0, 1, 2)
    ]
    found = tables.points(rows)
    ours = next(point for point in found if point.side == "presample")
    compared = tables.against(ours, tables.plain_curve(found, "toy"))
    assert compared.multiplier == pytest.approx(multiplier)
    assert compared.bound == bound
    assert compared.difference == pytest.approx(error(reached, 0) - error(0.5, 0))
    assert compared.deviation == pytest.approx(0.02 / math.sqrt(3))


def test_the_best_plain_run_at_equal_compute_may_be_a_shorter_one(bench):
    tables, sides = bench("tables"), bench("sides")
    errors = {0.5: 0.2, 1: 0.3, 2: 0.4}  # it overfits
    rows = [result(sides.Job("toy", "plain", 0.0, budget, 1e-2, 0), error) for budget, error in errors.items()]
    rows.append(result(sides.Job("toy", "history", 0.0, 1, 1e-2, 0), 0.25, compute=0.9))
    found = tables.points(rows)
    ours = next(point for point in found if point.side == "history")
    compared = tables.against(ours, tables.plain_curve(found, "toy"))
    assert compared.difference == pytest.approx(0.05)
    assert compared.bound == "≤ "
