"""``hf_importance.compare``: its verdict on runs that are given, and all sides of a real script and of a function."""

import csv
import math
import sys

import pytest
import toys
from test_examples import EXAMPLES, given, results
from transformers import TrainerState

from hf_importance import ImportanceTrainer
from hf_importance.compare import SIDES, Comparison, Row, compare, main

ON = {"steps_on": 50, "lowest_cost": 0.6}


def rows(metric="eval_accuracy", compute=0.6, **values):
    """Runs of as many seeds as there are values of a side."""
    made = []
    for side in SIDES:
        more = ON if side == "importance" else {}
        share = 1.0 if side == "plain" else compute
        made += [Row(side, seed, 100, 32, share, {metric: value}, **more) for seed, value in enumerate(values[side])]
    return made


def verdict(runs, metric="eval_accuracy", greater_is_better=True):
    return Comparison(runs, metric, greater_is_better).verdict()


def test_better_is_said_with_its_interval_over_the_better_of_the_two_that_cost_as_much():
    # Minus small: 0.004, 0.006, 0.005: mean 0.005, standard deviation 0.001; times 4.30 over the root of 3, 0.0025.
    runs = rows(
        plain=[0.9, 0.9, 0.9], short=[0.8, 0.8, 0.8], small=[0.90, 0.91, 0.89], importance=[0.904, 0.916, 0.895]
    )
    assert verdict(runs) == (
        "0.5 points better at equal compute (±0.25, 95 % over 3 seeds) than plain training with batches of another "
        "size, at 60% of the compute of plain training in full."
    )


def test_an_interval_that_holds_zero_is_no_difference():
    runs = rows(plain=[0.9, 0.9], short=[0.8, 0.9], small=[0.7, 0.8], importance=[0.82, 0.87])
    assert verdict(runs).startswith("no difference at equal compute: 0.5 points worse (±32, 95 % over 2 seeds)")


def test_of_a_loss_less_is_better_and_there_are_no_points():
    runs = rows("eval_loss", plain=[2.0] * 3, short=[1.5] * 3, small=[1.9] * 3, importance=[1.4, 1.4, 1.4])
    found = verdict(runs, "eval_loss", greater_is_better=False)
    assert found.startswith(
        "0.1 of loss better at equal compute (±0, 95 % over 3 seeds) than plain training with fewer"
    )


def test_of_runs_that_came_to_nothing_there_is_no_verdict_but_which_they_are():
    runs = rows("eval_loss", plain=[1.0, float("nan")], short=[1.5] * 2, small=[1.9] * 2, importance=[math.inf, 1.4])
    found = Comparison(runs, "eval_loss")
    assert found.verdict() == "none, since eval_loss is not a finite number in each run of plain, importance."
    assert found.table().splitlines()[1].split()[-1] == "nan"


def test_one_seed_has_no_interval_and_says_so():
    runs = rows(plain=[0.9], short=[0.8], small=[0.7], importance=[0.82])
    found = verdict(runs)
    assert found.startswith("2 points better at equal compute") and "of one seed, so there is no interval" in found
    assert "nan" not in str(Comparison(runs, "eval_accuracy", True))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([0.9, 0.8], "stayed off: identical runs, cost of a step at equal noise never below 1.12."),
        ([0.9, 0.81], "stayed off, cost of a step at equal noise never below 1.12; the runs differ nevertheless"),
    ],
)
def test_off_is_said_with_the_lowest_cost(ours, expected):
    runs = rows(plain=[0.9, 0.8], short=[0.9, 0.8], small=[0.9, 0.8], importance=ours)
    costs = iter((1.12, 1.3))
    runs = [
        Row(**{**vars(run), "steps_on": 0, "lowest_cost": next(costs)}) if run.side == "importance" else run
        for run in runs
    ]
    assert verdict(runs).startswith(expected)


def state(seed, importance_sampling, max_steps=100, size=32, accuracy=0.5, **more):
    own = {"steps_on": 60, "examples_scored": 4800, "examples_trained": 1600, "examples_saved": 1600, "kappa": 0.1}
    end = {
        "train_runtime": 1.0,
        **({f"importance/{name}": v for name, v in own.items()} if importance_sampling else {}),
    }
    log = [end, {"eval_loss": 1.0, "eval_accuracy": accuracy + seed / 100, "eval_runtime": 1.0}]
    return TrainerState(global_step=max_steps, train_batch_size=size, log_history=log)


def test_the_two_that_cost_as_much_get_the_steps_and_the_batch_and_seeds_take_turns(tmp_path):
    called = []

    def train(output_dir, per_device_train_batch_size=32, **changes):
        called.append((output_dir.rsplit("/", 1)[1], changes.get("max_steps"), per_device_train_batch_size))
        return state(size=per_device_train_batch_size, **changes)

    found = compare(train, seeds=(3, 4), output_dir=tmp_path)
    # 1,600 trained and 4,800 scored at 0.1, over 3,200: 0.65; 0.65 * 32 = 20.8.
    assert called == [
        *(("plain-3", None, 32), ("importance-3", None, 32), ("short-3", 65, 32), ("small-3", 100, 21)),
        *(("importance-4", None, 32), ("plain-4", None, 32), ("short-4", 65, 32), ("small-4", 100, 21)),
    ]
    assert (found.metric, found.greater_is_better) == ("eval_accuracy", True)
    assert found.of("short") == [0.53, 0.54]
    assert [row.compute for row in found.rows[:4]] == [1.0, 0.65, 0.65, 21 / 32]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="not all evaluated by eval_f1, but by eval_loss, eval_accuracy"):
        compare(lambda output_dir, **changes: state(**changes), (0,), "f1", output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"plain-0 has logged no evaluation: call trainer\.evaluate"):
        compare(lambda **changes: TrainerState(log_history=[{"loss": 1.0}]), (0,), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "the following arguments are required: script"),
        (["nowhere.py"], "there is no script nowhere.py"),
        (["{script}", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
    ],
)
def test_an_error_is_one_line(tmp_path, capsys, line, message):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit):
        main([word.format(script=script) for word in line])
    assert capsys.readouterr().err == f"python -m hf_importance.compare: error: {message}\n"


def test_a_run_that_fails_or_leaves_nothing_is_one_line_too(tmp_path, capsys):
    script = tmp_path / "train.py"
    for side in SIDES:
        (tmp_path / f"{side}-0").mkdir()
    for code, message in (("raise SystemExit(3)", "exit code 3"), ("", "end the script with trainer.save_state()")):
        script.write_text(f"{code}\n")
        with pytest.raises(SystemExit):
            main([str(script), "--output_dir", str(tmp_path)])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    # A run that is there is taken as it is, where that is asked for.
    state(0, False).save_to_json(str(tmp_path / "plain-0" / "trainer_state.json"))
    state(0, True).save_to_json(str(tmp_path / "importance-0" / "trainer_state.json"))
    with pytest.raises(SystemExit):
        main([str(script), "--seeds", "0", "--output_dir", str(tmp_path), "--reuse"])
    assert "short-0" in capsys.readouterr().err


def test_a_function_of_a_real_run_that_stays_off(tmp_path, digits):
    small = digits.select(range(128))

    def train(**changes):
        args = toys.arguments(**{"tmp_path": tmp_path, "max_steps": 4, **changes, "importance_log": "basic"})
        trainer = toys.run(ImportanceTrainer, toys.vit(), args, small, eval_dataset=small)
        trainer.evaluate()
        return trainer

    found = compare(train, seeds=(0, 1), output_dir=tmp_path)
    assert found.verdict() == "stayed off: identical runs."
    assert len(found.rows) == 8 and {row.steps_on for row in found.rows} == {0}


@pytest.mark.slow  # four processes
def test_a_script_is_run_on_all_sides_and_table_verdict_and_figure_come_out(tmp_path, monkeypatch, capfd):
    # One that saves half of the examples from the second step on, whatever the machine.
    settings = ["--importance_budget", "constant_variance"]
    monkeypatch.setattr(sys, "argv", ["compare"])
    arguments = [str(word) for word in given("language_modeling", tmp_path)]
    script = str(EXAMPLES / "language_modeling.py")
    main([script, "--seeds", "3", "--output_dir", str(tmp_path / "out"), *arguments, *settings])
    made = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [(row["side"], row["seed"]) for row in made] == [(side, "3") for side in SIDES]
    plain, ours = (results(tmp_path / "out" / f"{side}-3") for side in SIDES[:2])
    assert [float(row["eval_accuracy"]) for row in made[:2]] == [plain["eval_accuracy"], ours["eval_accuracy"]]
    # A step by importance scores three batches, each at kappa of the cost of training on it; there are three steps.
    kappa, trained = ours.get("importance/kappa", 1 / 3), ours["importance/examples_trained"]
    compute = (trained + kappa * ours["importance/examples_scored"]) / 24
    assert [float(row["compute"]) for row in made[:2]] == [1.0, pytest.approx(compute)]
    assert ours["importance/steps_on"] >= 1
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert "of one seed, so there is no interval" in printed and "nan" not in printed
    assert "=== importance, seed 3 (run 2 of at most 4): importance_sampling=True" in printed
