"""The arguments: what they take, how they come from a command line, and that nothing given is dropped in silence."""

import dataclasses
import logging
from types import SimpleNamespace
from typing import get_args

import pytest
import toys
from transformers import HfArgumentParser
from transformers.trainer_utils import HPSearchBackend

from hf_importance import (
    Auto,
    History,
    ImportanceArguments,
    ImportanceTrainer,
    ImportanceTrainingArguments,
    Observe,
    Presample,
)
from hf_importance.samplers.choose import sampler_of
from hf_importance.samplers.two_phase import TwoPhase
from hf_importance.theory.costs import Budget
from hf_importance.training_args import BatchNorm, Method, Score, ScoringDtype

METHODS = get_args(Method)


def trainer_of(args, **kwargs):
    return ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(), **kwargs)


def priced(folder, **overrides):
    """Arguments that leave the method as it is by default."""
    return toys.arguments(folder, presample_ratio="auto", tau_threshold=None, **overrides)


# ---- From the arguments to the sampler ----


def test_each_method_is_a_sampler():
    samplers = [sampler_of(ImportanceArguments(importance_method=method)) for method in METHODS]
    assert [type(sampler) for sampler in samplers] == [Presample, History, Auto, TwoPhase, Observe]


def test_every_argument_arrives():
    settings = {"margin": 1.3, "momentum": 0.5, "resampling": "multinomial", "bias": 0.7, "kappa": 0.2}
    args = ImportanceArguments(
        importance_budget="variance",
        importance_score="loss",
        presample_ratio=2.5,
        tau_threshold=1.7,
        importance_kwargs=settings,
    )
    assert sampler_of(args) == Presample(ratio=2.5, threshold=1.7, budget="variance", score="loss", **settings)
    settings = {"margin": 1.3, "share": 0.2, "momentum": 0.5, "bias": 0.7}
    args = ImportanceArguments(importance_method="history", importance_score="loss", importance_kwargs=settings)
    assert sampler_of(args) == History(score="loss", **settings)


@pytest.mark.parametrize("method", ["auto", "observe"])
def test_each_of_the_two_in_auto_gets_what_it_knows(method):
    settings = {"margin": 1.3, "share": 0.2, "momentum": 0.5, "resampling": "multinomial", "bias": 0.7, "kappa": 0.2}
    sampler = sampler_of(
        ImportanceArguments(
            importance_method=method, presample_ratio=2.5, importance_score="loss", importance_kwargs=settings
        )
    )
    fresh, remembered = sampler.fresh, sampler.remembered
    assert (fresh.ratio, fresh.resampling, fresh.kappa, remembered.share) == (2.5, "multinomial", 0.2, 0.2)
    for both in (fresh, remembered):
        assert (both.margin, both.momentum, both.bias, both.score) == (1.3, 0.5, 0.7, "loss")
    assert fresh.budget == remembered.budget == "variance"


def test_the_budget_follows_the_ratio_unless_it_is_given():
    for method in ("auto", "observe"):
        for settings, budget, memory in (
            ({}, "constant_variance", "constant_variance"),
            ({"presample_ratio": 2.5}, "variance", "variance"),
            ({"presample_ratio": 2.5, "importance_budget": "constant_variance"}, *["constant_variance"] * 2),
            # Steps that cost what a uniform one does cannot be had from memory: there it is less noise.
            ({"importance_budget": "constant_time"}, "constant_time", "variance"),
        ):
            sampler = sampler_of(ImportanceArguments(importance_method=method, **settings))
            assert (sampler.fresh.budget, sampler.remembered.budget) == (budget, memory)


# ---- importance_kwargs ----


@pytest.mark.parametrize(
    ("method", "name", "known"),
    [
        ("presample", "variance_margin", "margin"),
        ("presample", "share", "resampling"),
        ("history", "resampling", "share"),
        ("auto", "threshold", "share"),
        ("observe", "nonsense", "kappa"),
    ],
)
def test_an_unknown_name_is_refused_and_the_known_ones_listed(tmp_path, method, name, known):
    args = toys.arguments(tmp_path, importance_method=method, importance_kwargs={name: 0.5})
    message = rf"importance_kwargs has '{name}', which importance_method='{method}' does not know\. It knows .*{known}"
    with pytest.raises(ValueError, match=message):
        trainer_of(args)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("history", {"share": 0.0}, r"share must be a number in \(0, 1\], but it is 0\.0"),
        ("history", {"bias": float("nan")}, r"bias must be a number in \[0, 1\], but it is nan"),
        ("auto", {"share": 1.5}, r"share must be a number in \(0, 1\], but it is 1\.5"),
        ("observe", {"kappa": -1}, r"kappa must be a number in \(0, 1\], but it is -1"),
    ],
)
def test_a_value_out_of_range_is_refused_whatever_the_method(tmp_path, method, settings, message):
    args = toys.arguments(tmp_path, importance_method=method, importance_kwargs=settings)
    with pytest.raises(ValueError, match=message):
        trainer_of(args)


def test_json_is_as_good_as_a_dict():
    given = '{"margin": 1.2, "resampling": "multinomial"}'
    args = ImportanceArguments(importance_method="presample", importance_kwargs=given)
    assert sampler_of(args) == Presample(margin=1.2, resampling="multinomial")
    assert args.importance_kwargs == given  # a field holds what was given


# ---- The command line ----


def test_all_of_them_come_from_a_command_line(tmp_path):
    given = {
        "importance_sampling": "False",
        "importance_method": "presample",
        "importance_budget": "constant_time",
        "importance_score": "loss",
        "presample_ratio": "2.5",
        "tau_threshold": "1.5",
        "scoring_batch_size": "64",
        "scoring_dtype": "bf16",
        "batch_norm": "frozen",
        "importance_log": "all",
        "importance_kwargs": '{"margin": 1.2}',
    }
    assert set(given) == {field.name for field in dataclasses.fields(ImportanceArguments)}
    line = [part for name, value in given.items() for part in (f"--{name}", value)]
    (args,) = HfArgumentParser(ImportanceTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", *line]
    )
    assert args.importance_sampling is False
    assert (args.ratio, args.threshold, args.scoring_batch_size) == (2.5, 1.5, 64)
    assert (args.importance_budget, args.importance_score) == ("constant_time", "loss")
    assert (args.scoring_dtype, args.batch_norm, args.kwargs) == ("bf16", "frozen", {"margin": 1.2})
    assert sampler_of(args) == Presample(2.5, 1.5, "constant_time", "loss", margin=1.2)


def test_without_any_they_are_the_defaults(tmp_path):
    (args,) = HfArgumentParser(ImportanceTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu"]
    )
    defaults = ImportanceArguments()
    for field in dataclasses.fields(ImportanceArguments):
        assert getattr(args, field.name) == getattr(defaults, field.name), field.name
    assert sampler_of(args) == Auto()
    # What says by tau when pools are scored leaves nothing for a price to choose.
    assert sampler_of(ImportanceArguments(tau_threshold=2.0)) == Presample(threshold=2.0)
    assert sampler_of(ImportanceArguments(importance_kwargs={"threshold": 2.0})) == Presample(threshold=2.0)


def test_help_lists_the_choices():
    help_text = " ".join(HfArgumentParser(ImportanceTrainingArguments).format_help().split())
    for name, choices in {
        "importance_method": METHODS,
        "importance_budget": get_args(Budget),
        "importance_score": get_args(Score),
        "scoring_dtype": get_args(ScoringDtype),
        "batch_norm": get_args(BatchNorm),
    }.items():
        assert f"--{name} {{{','.join(choices)}}}" in help_text, name


@pytest.mark.parametrize("line", [["--importance_method", "prioritized"], ["--batch_norm", "weighted"]])
def test_a_choice_that_is_none_is_refused(tmp_path, line, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(ImportanceTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", *line]
        )
    error = capsys.readouterr().err
    assert f"argument {line[0]}" in error and f"invalid choice: '{line[1]}'" in error


# ---- What contradicts, and what has no effect ----


@pytest.mark.parametrize("method", ["history", "auto", "observe"])
def test_a_sampler_and_a_method_are_refused(tmp_path, method):
    args = toys.arguments(tmp_path, importance_method=method)
    message = rf"sampler=Presample\(\.\.\.\) and importance_method='{method}' were given.*Pass one of the two"
    with pytest.raises(ValueError, match=message):
        trainer_of(args, sampler=Presample())


@pytest.mark.parametrize(
    ("settings", "sampler", "message"),
    [
        (
            {"importance_method": "history", "presample_ratio": 2.0, "tau_threshold": 2.0},
            None,
            "presample_ratio, tau_threshold: no effect with importance_method='history'.",
        ),
        (
            {"importance_method": "auto", "tau_threshold": 2.0},
            None,
            "tau_threshold: no effect with importance_method='auto'.",
        ),
        (
            {"presample_ratio": 2.0, "tau_threshold": None, "importance_budget": "variance", "margin": 1.2},
            Presample(),
            "importance_budget, presample_ratio, importance_kwargs: no effect with sampler=Presample(...), whose "
            "constructor takes its settings.",
        ),
    ],
)
def test_an_argument_without_effect_warns_once(tmp_path, caplog, settings, sampler, message):
    trainer = trainer_of(toys.arguments(tmp_path, max_steps=1, **settings), sampler=sampler)
    assert [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()] == [message]
    trainer.train()
    trainer.train()
    assert caplog.text.count("no effect") == 1


def test_what_has_its_effect_does_not_warn(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "hf_importance")
    trainer_of(toys.arguments(tmp_path, importance_budget="variance", importance_score="loss", margin=1.2))
    trainer_of(priced(tmp_path), sampler=Presample(ratio=2.0))
    trainer_of(toys.arguments(tmp_path, importance_method="history", tau_threshold=2.0, importance_sampling=False))
    assert not caplog.records


# ---- Set later ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("importance_method", "nonsense", "importance_method must be one of None, .*, but it is 'nonsense'"),
        ("presample_ratio", 0.5, r"presample_ratio must be a finite number above 1, or 'auto', but it is 0\.5"),
        ("tau_threshold", 1.0, r"tau_threshold must be a finite number above 1, but it is 1\.0"),
        ("scoring_batch_size", 0, "scoring_batch_size must be at least 1, but it is 0"),
        ("importance_kwargs", {"marign": 1.2}, "importance_kwargs has 'marign'"),
        ("importance_kwargs", {"margin": 0.1}, "margin must be a finite number of at least 1"),
    ],
)
def test_values_set_later_are_checked_when_training_starts(tmp_path, name, value, message):
    trainer = trainer_of(priced(tmp_path))
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_values_set_later_hold(tmp_path):
    trainer = trainer_of(priced(tmp_path, max_steps=2))
    trainer.args.presample_ratio, trainer.args.tau_threshold = 3.0, 1.25
    trainer.train()
    assert trainer.sampler == Presample(ratio=3.0, threshold=1.25)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["importance/tau_threshold"] == 1.25


def test_values_of_a_search_hold_in_their_own_trial(tmp_path, monkeypatch):
    # As Optuna's, which need not be there: a trial has a number and values.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = trainer_of(priced(tmp_path, max_steps=1))
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for threshold, margin in ((1.25, 1.2), (1.5, 1.4)):
        values = {"tau_threshold": threshold, "importance_kwargs": {"margin": margin}}
        trainer.train(trial=SimpleNamespace(number=0, params=values))
        assert (trainer.sampler.threshold, trainer.sampler.margin) == (threshold, margin)
    with pytest.raises(ValueError, match=r"tau_threshold must be a finite number above 1, but it is 0\.5"):
        trainer.train(trial=SimpleNamespace(number=1, params={"tau_threshold": 0.5}))


# ---- Copies ----


def test_replacing_one_value_leaves_the_others_what_they_were(tmp_path):
    # What follows from a value is not written into another, so each copy means what it says.
    plain = ImportanceArguments(importance_method="presample")
    assert sampler_of(plain).budget == "constant_variance"
    fixed = dataclasses.replace(plain, presample_ratio=3.0)
    assert sampler_of(fixed) == Presample(ratio=3.0, budget="variance")
    assert sampler_of(dataclasses.replace(fixed, presample_ratio="auto")) == sampler_of(plain)
    assert sampler_of(dataclasses.replace(plain, importance_method="history")).budget == "variance"
    assert dataclasses.replace(plain) == plain

    args = toys.arguments(tmp_path, importance_kwargs='{"margin": 1.2}', presample_ratio="2.5", tau_threshold=1.5)
    assert sampler_of(args) == Presample(2.5, 1.5, "variance", margin=1.2)  # a threshold is one of pools
    twin = dataclasses.replace(args, tau_threshold=None)
    for field in dataclasses.fields(ImportanceArguments):
        expected = None if field.name == "tau_threshold" else getattr(args, field.name)
        assert getattr(twin, field.name) == expected, field.name
    assert sampler_of(twin) == Auto(Presample(ratio=2.5, margin=1.2), History("variance", margin=1.2))
