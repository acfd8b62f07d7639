"""A saved state is taken up whole or refused by name: whatever stands in the file, nothing else comes of it."""

import copy
import json
import logging
import shutil

import pytest
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resume import build
from transformers import Trainer

from hf_importance import Auto, History, Presample
from hf_importance.checkpoint.schema import check
from hf_importance.checkpoint.state import VERSION, ImportanceStateCallback, saved_state
from hf_importance.checkpoint.whole import HalfWritten, check_whole
from hf_importance.run.saved import schema
from hf_importance.theory.calibration import BINS
from hf_importance.theory.variance import SHARES

NAME = ImportanceStateCallback.__name__
VALID = {
    "version": VERSION,
    "step": 5,
    "run": {
        "tau": 1.5,
        "switches": 1,
        "switched": 1,
        "steps_on": 4,
        "largest_tau": 1.5,
        "lowest_cost": None,
        "drawn": True,
        "items": 80.0,
        "examples": 80.0,
        "compared": [1.0, 0.0],
        "proven": True,
        "scoring_dtype": None,
    },
    "totals": {
        "examples_scored": 0,
        "examples_trained": 80,
        "examples_distinct": 80,
        "examples_saved": 0,
        "nonfinite_steps": 0,
    },
    "feed": {
        "reserve": 8,
        "parts": 2,
        "draws": 2,
        "visited": 3,
        "visits": {"batch_size": 12.5, "length": 4, "number": 1, "uniform": False, "kept": None},
        "stream": {"passes": 0, "drawn": 0},
    },
    "clock": {
        "next_pair": 80,
        "pairs": [0.2, 0.3, 0.2, 0.2, 0.1],
        "probed": True,
        "few": [],
        "pools": [],
        "next_overhead": 40,
        "factor": 1.1,
        "overhead": None,
    },
    "table": {"paired": 12, "waiting": 1},
    "loss_over_step": None,
    "class_weights": {
        "products": [0.4, 2.0],
        "squares": [1.0, 0.5],
        "mean": 1.0,
        "by_sum": True,
        "by_count": False,
        "left": 12,
        "known": True,
        "whole": False,
        "outside": True,
        "counts": [40.0, 8.0],
        "recent": [0.0, 0.0],
    },
    "sampler": {
        "settings": {"name": "Auto", "fresh.ratio": "3.0", "remembered.share": "0.1"},
        "state": {
            "fresh": {"on": True, "switched": 12, "moments": [0.5] * len(SHARES), "pairs": [0.0] * 3 * BINS},
            "remembered": {
                "count": 9.0,
                "uniform_moment": 2.0,
                "promised_moment": 1.0,
                "promised": 1.5,
                "drawn": True,
                "skipped_share": 0.5,
                "edges": [0.5],
                "levels": [0.1, 2.0],
                "counts": [100, 28],
            },
        },
    },
    "settings": {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "seed": 42,
        "train_dataset length": 128,
    },
}
STATE = schema(Auto())


def entry(state):
    return {NAME: {"args": {}, "attributes": {"importance": state}}}


def paths(value, prefix=()):
    yield prefix
    for key in value if isinstance(value, dict) else ():
        yield from paths(value[key], (*prefix, key))


def replaced(path, value):
    state = copy.deepcopy(VALID)
    if not path:
        return value
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return state


HUGE = st.sampled_from([10**400, -(10**400), 2**63, 1e308, float("inf"), float("-inf"), float("nan"), "9" * 5000])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | HUGE
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(paths(VALID))), JSON)
def test_any_json_in_place_of_any_field_is_taken_up_or_refused(path, value):
    state = replaced(path, value)
    try:
        found = saved_state(entry(state), "trainer_state.json", STATE)
    except ValueError as error:
        assert str(error).startswith("trainer_state.json: ")
        assert "resume from an older checkpoint, or delete the entry" in str(error)
        assert len(str(error)) < 700  # however large the value
    else:
        if found is None:
            assert state == {}  # as a plain Trainer's copy leaves it
        else:
            check(found, STATE, "state")
            assert found is state


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_in_place_of_the_callbacks_is_taken_up_or_refused(value):
    for callbacks in (value, {NAME: value}, {NAME: {"args": value, "attributes": {"importance": VALID}}}):
        try:
            found = saved_state(callbacks, "file", STATE)
        except ValueError as error:
            assert str(error).startswith("file: ")
        else:
            assert found in (None, VALID)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v, default=str).encode()))
def test_any_bytes_in_place_of_the_file_are_taken_up_or_refused(tmp_path, content):
    file = tmp_path / "trainer_state.json"
    file.write_bytes(content)
    try:
        check_whole(tmp_path, STATE)
    except ValueError as error:
        assert str(file) in str(error)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 7, r"version 7, and this package knows versions up to 4; a newer hf_importance"),
        (("version",), 1, r"version 1, that of an earlier hf_importance, and this one reads version 4 only"),
        (("version",), 3, r"version 3, that of an earlier hf_importance, and this one reads version 4 only"),
        (("version",), "4", r"version must be an integer from 4 to 4, but it is '4'"),
        (("version",), True, r"version must be an integer from 4 to 4, but it is True"),
        (("run", "tau"), float("nan"), r"run.tau must be a number from 0.999999 to 1e\+09, but it is nan"),
        (("run", "tau"), 1e308, r"run.tau must be a number"),
        (("run", "drawn"), 1, r"run.drawn must be true or false, but it is 1"),
        (("run", "proven"), 0, r"run.proven must be true or false, but it is 0"),
        (("run", "switched"), -1, r"run.switched must be an integer from 0"),
        (("run", "switches"), -1, r"run.switches must be an integer from 0"),
        (("feed", "reserve"), 1.0, r"feed.reserve must be an integer .* but it is 1.0"),
        (("feed", "reserve"), 10**400, r"but it is an integer of about 401 digits"),
        (
            ("feed", "visits"),
            4,
            r"feed.visits must be an object with batch_size, length, .* but it is 4",
        ),
        (("totals",), [1, 2], r"totals must be an object with examples_scored, .* but it is \[1, 2\]"),
        (("totals", "extra"), 1, r"totals has a field 'extra' that is not known there"),
        (("sampler",), {}, r"sampler must be an object with settings and state, but it is \{\}"),
        (("sampler", "settings"), {}, r"sampler must be an object with settings and state, but it is "),
        (("sampler", "state", "fresh", "on"), 1, r"the state of Auto.fresh.on must be true or false, but it is 1"),
        (("sampler", "state", "fresh", "moments"), [0.5], rf"fresh.moments must be a list of {len(SHARES)} values"),
        (
            ("sampler", "state", "remembered", "counts"),
            [0.5],
            r"remembered.counts must be a list of values, each an",
        ),
        (("sampler", "state", "more"), 1, r"the state of Auto has a field 'more' that is not known there"),
        (("settings", "world_size"), 2**53, r"settings.world_size must be an integer from 1 to 1048576"),
        (("loss_over_step",), 0, r"loss_over_step must be true or false, or null, but it is 0"),
        (("feed", "stream"), "x" * 10_000, r"stream must be an object with passes, drawn, but it is 'xxx.{5,60}\."),
    ],
)
def test_the_error_names_the_field_and_the_value(path, value, message):
    with pytest.raises(ValueError, match=message):
        saved_state(entry(replaced(path, value)), "file", STATE)


# Settings of a sampler that an earlier version had not are told as changed ones.
NEEDED = [path for path in paths(VALID) if path and not (path[:2] == ("sampler", "settings") and "." in path[-1])]


@pytest.mark.parametrize("path", NEEDED)
def test_no_field_may_be_missing(path):
    state = copy.deepcopy(VALID)
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    said = rf"{'.'.join(path)} is missing"
    if path[0] == "sampler" and len(path) > 1:
        inner = ".".join(path[2:])
        said = (
            rf"the state of Auto.{inner} is missing" if path[1] == "state" and inner else "sampler must be an object"
        )
    with pytest.raises(ValueError, match=said):
        saved_state(entry(state), "file", STATE)


def test_the_state_of_another_sampler_is_looked_at_no_further():
    for found in ("History", "MySampler"):
        state = copy.deepcopy(VALID)
        state["sampler"] = {"settings": {"name": found}, "state": {"whatever": [1, None]}}
        assert saved_state(entry(state), "file", schema(Presample())) is state
    with pytest.raises(ValueError, match=r"the state of History.count is missing"):
        state["sampler"]["settings"]["name"] = "History"
        saved_state(entry(state), "file", schema(History()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 10 steps with checkpoints at 5 and 10."""
    folder = tmp_path_factory.mktemp("trained")
    build(folder, toys.sentences(128)).train()
    return folder


def rewrite(file, text):
    file.write_text(text)
    return file.parent


def resume_from(folder, tmp_path):
    build(tmp_path / "resumed", toys.sentences(128)).train(resume_from_checkpoint=str(folder))


DEEP = '{"log_history": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"\(0 bytes\) is empty, cut off or damaged: Expecting value"),
        ('{"global_step": 5,', r"\(18 bytes\) is empty, cut off or damaged"),
        ('{"global_step": ' + "9" * 5000 + "}", r"is empty, cut off or damaged: Exceeds the limit"),
        (DEEP, "nested too deep to be the state of a Trainer"),
        ("[1, 2]", r"must hold an object, but it holds \[1, 2\]"),
        ('{"stateful_callbacks": 3}', "stateful_callbacks must be an object, but it is 3"),
        (json.dumps({"stateful_callbacks": {NAME: {"args": {"state_dict": "x"}, "attributes": {}}}}), "args has a f"),
        (json.dumps({"stateful_callbacks": entry({"version": 7})}), "has version 7"),
    ],
)
def test_a_bad_state_file_is_refused_by_name_before_anything_is_loaded(trained, tmp_path, content, message):
    file = trained / "checkpoint-5" / "trainer_state.json"
    whole, others = file.read_text(), snapshot(trained / "checkpoint-10")
    try:
        trainer = build(tmp_path, toys.sentences(128))
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as raised:
            trainer.train(resume_from_checkpoint=str(rewrite(file, content)))
        assert str(file) in str(raised.value)
        assert all(value.equal(before[name]) for name, value in trainer.model.state_dict().items())
        assert file.read_text() == content  # nothing is repaired or overwritten
        assert snapshot(trained / "checkpoint-10") == others
    finally:
        file.write_text(whole)


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_half_written_checkpoint_is_named_and_passed_over(trained, tmp_path, caplog, name):
    folder = shutil.copytree(trained, tmp_path / "killed")
    file = folder / "checkpoint-10" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(HalfWritten, match=rf"checkpoint-10/{name}.*resume_from_checkpoint=True takes the newest"):
        resume_from(file.parent, tmp_path)
    trainer = build(folder, toys.sentences(128), max_steps=6)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    messages = [r.getMessage() for r in caplog.records if "not from what is newer" in r.getMessage()]
    assert len(messages) == 1
    assert str(file) in messages[0]


def test_where_no_checkpoint_is_whole_it_says_so(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer = build(tmp_path, toys.sentences(128))
    with pytest.raises(
        ValueError, match=r"no whole checkpoint .*checkpoint-10 has no trainer_state.json.*Delete them"
    ):
        trainer.train(resume_from_checkpoint=True)
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").rmdir()
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):  # the Trainer's own
        trainer.train(resume_from_checkpoint=True)


def test_a_folder_that_is_written_over_does_not_look_whole_meanwhile(trained, tmp_path):
    seen = []

    class Look(type(build(tmp_path, toys.sentences(128)))):
        def _save_optimizer_and_scheduler(self, output_dir):
            with pytest.raises(HalfWritten, match=r"has no trainer_state.json"):
                check_whole(trained / "checkpoint-10", schema(Presample()))
            seen.append(output_dir)
            super()._save_optimizer_and_scheduler(output_dir)

    check_whole(trained / "checkpoint-10", schema(Presample()))
    trainer = build(trained, toys.sentences(128), kind=Look)
    trainer.train(resume_from_checkpoint=str(trained / "checkpoint-5"))
    assert seen == [str(trained / "checkpoint-10")]
    check_whole(trained / "checkpoint-10", schema(Presample()))


def test_a_state_left_over_from_an_earlier_step_is_not_taken_up(trained, tmp_path, caplog):
    # A plain Trainer that resumes from our checkpoint writes our state, as old as it is, into its own.
    data = toys.sentences(128)
    build(tmp_path, data, kind=Trainer).train(resume_from_checkpoint=str(trained / "checkpoint-5"))
    trainer = build(tmp_path, data, max_steps=11)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    messages = [r.getMessage() for r in caplog.records if "starts fresh" in r.getMessage()]
    assert len(messages) == 1
    assert "step 10 was not written by ImportanceTrainer, whose state in it is that of step 5" in messages[0]
