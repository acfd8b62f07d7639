"""What is logged, and the arguments on their way in; ``test_backends.py`` reads the logs back from the backends."""

import json

import pytest
import torch
import toys
from transformers import HfArgumentParser

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting.report import BASIC, Report, Totals, outcome

KEYS = {
    "tau",
    "tau_threshold",
    "batch_size_gain",
    "kappa",
    "active",
    "active_share",
    "switches",
    "switched_at",
    "max_weight",
    "effective_sample_size",
    "scoring_time_share",
    "examples_scored",
    "examples_trained",
    "examples_distinct",
    "examples_saved",
    "nonfinite_steps",
}


def test_every_logged_value_is_a_plain_number(tmp_path, digits):
    trainer = toys.run(ImportanceTrainer, toys.vit(), toys.always_on(tmp_path), digits.select(range(128)))
    entries = [e for e in trainer.state.log_history if "importance/tau" in e]
    assert [e["step"] for e in entries if "loss" in e] == [e["step"] for e in entries] == [2, 4, 6, 8]
    for entry in entries:
        assert {type(value) for name, value in entry.items() if name.startswith("importance/")} <= {int, float}
    assert {"importance/" + key for key in KEYS} <= set(entries[-1])


def test_by_default_the_log_holds_what_people_look_at_and_the_end_holds_the_counts(tmp_path, digits):
    args = toys.arguments(tmp_path, importance_log="basic", presample_ratio="auto", tau_threshold=None, kappa=0.1)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        assert {name for name in entry if name.startswith("importance/")} == {f"importance/{name}" for name in BASIC}
    end = {name.removeprefix("importance/") for name in trainer.state.log_history[-1]}
    assert {"steps_on", "examples_scored", "examples_trained", "largest_tau", "lowest_cost", "kappa"} <= end


def test_the_relative_cost_is_the_price_that_it_goes_by_and_the_end_knows_the_lowest(tmp_path, digits):
    args = toys.arguments(tmp_path, logging_steps=1, presample_ratio="auto", tau_threshold=None, kappa=0.1)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    *logged, end = trainer.state.log_history
    costs = [entry["importance/relative_cost"] for entry in logged]
    assert costs == [entry["importance/price_presample"] for entry in logged]
    assert end["importance/lowest_cost"] == min(costs)
    assert end["importance/largest_tau"] == max(entry["importance/tau"] for entry in logged)


ENDS = {
    "never on in 8 steps, which were the plain Trainer's: a warning says what": {"ruled_out": 1.0},
    "the largest τ was 1.40, and its threshold is 2.00. That is right": {"tau_threshold": 2.0, "lowest_cost": 0.9},
    "at equal noise a step never cost less than 1.12 uniform steps (largest τ 1.4). That is": {"lowest_cost": 1.1249},
    "they were too few to know what it costs. That is right": {},
    "on in 3 of 8 steps, 125% of the compute of uniform steps; largest τ 1.4.": {"steps_on": 3},
}


@pytest.mark.parametrize("expected", ENDS)
def test_the_end_is_said_in_one_sentence(expected):
    counts = {"steps_on": 0, "largest_tau": 1.4, "kappa": 0.25, "examples_scored": 10, "examples_trained": 10}
    end = {f"importance/{name}": v for name, v in {**counts, "examples_saved": 0, **ENDS[expected]}.items()}
    assert expected in outcome(end, 8)


@pytest.mark.parametrize("threshold", [1.0 + 1e-9, 3.9])
def test_it_is_the_last_line_that_a_run_prints(tmp_path, digits, capsys, threshold):
    args = toys.arguments(tmp_path, tau_threshold=threshold, momentum=0.0)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == outcome(trainer.state.log_history[-1], 8)
    assert ("on in 7 of 8 steps" in last) == (threshold < 2) != ("never on in 8 steps" in last)


def test_the_gain_is_tau_squared_and_shares_are_shares(tmp_path, digits):
    trainer = toys.run(ImportanceTrainer, toys.vit(), toys.always_on(tmp_path), digits.select(range(128)))
    for entry in (e for e in trainer.state.log_history if "loss" in e):
        assert entry["importance/batch_size_gain"] == pytest.approx(entry["importance/tau"] ** 2)
        assert 0 <= entry["importance/scoring_time_share"] < 1
        assert 1 <= entry["importance/effective_sample_size"] <= 16
    assert entry["importance/scoring_time_share"] > 0


def test_disabled_logs_nothing_of_ours(tmp_path, digits):
    args = toys.arguments(tmp_path, importance_sampling=False)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    assert not any(key.startswith("importance/") for entry in trainer.state.log_history for key in entry)


def test_a_report_averages_since_the_last_log_and_counts_since_the_start():
    report = Report(lambda values: [2 * value for value in values], everything=True)  # two ranks with equal counts
    report.step(False)
    report.sample_size(4)
    report.add(Totals(examples_trained=4, examples_distinct=4))
    report.step(True)
    report.weights(torch.tensor([1.0, 3.0]))
    report.add(Totals(examples_scored=12, examples_trained=2, examples_distinct=1, examples_saved=3))
    first = report.drain(1.5, True, 3, {"gain": 1.25, "kappa": 0.2})
    assert first["importance/tau"] == 1.5
    assert first["importance/batch_size_gain"] == 1.5**2
    assert first["importance/active"] == 1
    assert first["importance/switches"] == 3
    assert first["importance/active_share"] == 0.5
    assert first["importance/kappa"] == 0.2
    assert first["importance/max_weight"] == 3
    assert first["importance/effective_sample_size"] == pytest.approx((4 + 1.6) / 2)
    assert first["importance/examples_trained"] == 2 * 6
    assert first["importance/gain"] == 1.25
    assert first["importance/examples_distinct"] == 2 * 5
    assert first["importance/examples_saved"] == 2 * 3
    assert first["importance/examples_scored"] == 2 * 12
    report.step(False)
    report.sample_size(4)
    report.add(Totals(examples_trained=4, examples_distinct=4))
    second = report.drain(1.5, False, 4, {})
    assert second["importance/active_share"] == 0
    assert second["importance/max_weight"] == 1
    assert second["importance/examples_trained"] == 2 * 10
    summary = report.summary(1, {"kappa": 0.2})
    assert summary["importance/steps_on"] == 1  # the same on every rank, so not summed
    assert summary["importance/examples_saved"] == 2 * 3
    assert summary["importance/kappa"] == 0.2


# Some arguments refuse each other.
ARGUMENTS = [
    {
        "importance_sampling": False,
        "importance_method": "history",
        "importance_score": "loss",
        "importance_budget": "constant_variance",
        "scoring_batch_size": 7,
        "scoring_dtype": "bf16",
        "batch_norm": "frozen",
        "importance_kwargs": {"margin": 1.5, "share": 0.25, "bias": 0.5},
    },
    {
        "importance_method": "presample",
        "presample_ratio": 4.5,
        "tau_threshold": 1.75,
        "importance_kwargs": {"momentum": 0.5, "resampling": "multinomial"},
    },
    {"importance_method": "auto", "importance_budget": "constant_time"},
    {"importance_method": "observe", "importance_log": "all"},
]


def test_every_argument_is_listed():
    fields = {f.name for f in ImportanceTrainingArguments.__mro__[1].__dataclass_fields__.values()}
    assert fields == {name for settings in ARGUMENTS for name in settings}


def on_the_command_line(value) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("settings", ARGUMENTS)
def test_every_argument_is_parsed_from_the_command_line_json_and_yaml(tmp_path, settings):
    # Of these the command line gives text, and a field keeps what was given.
    meant = {"presample_ratio": "ratio", "importance_kwargs": "kwargs"}

    def found(args):
        return {name: getattr(args, meant.get(name, name)) for name in settings}

    parser = HfArgumentParser(ImportanceTrainingArguments)
    line = [word for name, value in settings.items() for word in (f"--{name}", on_the_command_line(value))]
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *line])
    assert found(args) == settings
    for suffix, dump, parse in (
        ("json", json.dumps, parser.parse_json_file),
        ("yaml", lambda d: "\n".join(f"{k}: {json.dumps(v)}" for k, v in d.items()), parser.parse_yaml_file),
    ):
        file = tmp_path / f"arguments.{suffix}"
        file.write_text(dump({"output_dir": str(tmp_path), **settings}))
        (args,) = parse(str(file))
        assert found(args) == settings
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--no_importance_sampling"])
    assert not args.importance_sampling


def test_auto_is_parsed_from_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--presample_ratio", "auto"]
    (args,) = HfArgumentParser(ImportanceTrainingArguments).parse_args_into_dataclasses(words)
    assert (args.presample_ratio, args.ratio) == ("auto", None)
    assert args.tau_threshold is None and args.threshold is None  # on by its price


def test_help_lists_the_choices_and_refuses_others(tmp_path, capsys):
    parser = HfArgumentParser(ImportanceTrainingArguments)
    shown = parser.format_help()
    for choices in (
        "presample,history,auto,two_phase,observe",
        "upper_bound,loss",
        "untouched,frozen",
        "bf16,fp16,fp32,auto",
        "basic,all",
    ):
        assert f"{{{choices}}}" in shown
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--importance_method", "prioritized"])
    assert "invalid choice: 'prioritized'" in capsys.readouterr().err
