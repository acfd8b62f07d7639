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

from hf_importance.checkpoint import STATE, VERSION, ImportanceStateCallback, saved_state
from hf_importance.schema import check
from hf_importance.variance import SHARES
from hf_importance.whole_checkpoints import HalfWritten, check_whole

NAME = ImportanceStateCallback.__name__
VALID = {
    "version": VERSION,
    "step": 5,
    "switch": {"tau": 1.5, "active": True, "switches": 1},
    "variance": [0.5] * len(SHARES),
    "steps_on": 4,
    "totals": {
        "examples_scored": 0,
        "examples_trained": 80,
        "examples_saved": 0,
        "examples_distinct": 80,
        "nonfinite_steps": 0,
    },
    "reserve_position": 8,
    "kappa": 0.2,
    "training_seconds": 0.01,
    "overhead": None,
    "stream": {"passes": 0, "drawn": 0},
    "loss_over_step": None,
    "history": {
        "averages": {"count": 9.0, "uniform_moment": 2.0, "drawn_moment": 1.0, "items": 80.0, "examples": 80.0},
        "passes": 2,
        "skipped_share": 0.5,
        "pass": {"batch_size": 12.5, "length": 4, "number": 1, "uniform": False, "position": 3},
    },
    "settings": {
        "importance_method": "history",
        "importance_score": "upper_bound",
        "presample_ratio": 3.0,
        "resampling": "systematic",
        "tau_threshold": 2.0,
        "tau_momentum": 0.9,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "seed": 42,
        "train_dataset length": 128,
    },
}


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
        found = saved_state(entry(state), "trainer_state.json")
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
            found = saved_state(callbacks, "file")
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
        check_whole(tmp_path)
    except ValueError as error:
        assert str(file) in str(error)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 7, r"version 7, and this package knows versions up to 1; a newer hf_importance"),
        (("version",), "1", r"version must be an integer from 1 to 1, but it is '1'"),
        (("version",), True, r"version must be an integer from 1 to 1, but it is True"),
        (("switch", "tau"), float("nan"), r"switch.tau must be a number from 0.999999 to 1e\+09, but it is nan"),
        (("switch", "tau"), 1e308, r"switch.tau must be a number"),
        (("switch", "active"), 1, r"switch.active must be true or false, but it is 1"),
        (("switch", "switches"), -1, r"switch.switches must be an integer from 0"),
        (("reserve_position",), 1.0, r"reserve_position must be an integer .* but it is 1.0"),
        (("reserve_position",), 10**400, r"but it is an integer of about 401 digits"),
        (("totals",), [1, 2], r"totals must be an object with examples_scored, .* but it is \[1, 2\]"),
        (("totals", "extra"), 1, r"totals has a field 'extra' that is not known there"),
        (("settings", "resampling"), "poisson", r"one of 'systematic', 'multinomial', but it is 'poisson'"),
        (("settings", "world_size"), 2**53, r"settings.world_size must be an integer from 1 to 1048576"),
        (("loss_over_step",), 0, r"loss_over_step must be true or false, or null, but it is 0"),
        (("stream",), "x" * 10_000, r"stream must be an object with passes, drawn, but it is 'xxx.{5,60}\."),
    ],
)
def test_the_error_names_the_field_and_the_value(path, value, message):
    with pytest.raises(ValueError, match=message):
        saved_state(entry(replaced(path, value)), "file")


@pytest.mark.parametrize("path", [path for path in paths(VALID) if path])
def test_no_field_may_be_missing(path):
    state = copy.deepcopy(VALID)
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    with pytest.raises(ValueError, match=rf"{'.'.join(path)} is missing"):
        saved_state(entry(state), "file")


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
                check_whole(trained / "checkpoint-10")
            seen.append(output_dir)
            super()._save_optimizer_and_scheduler(output_dir)

    check_whole(trained / "checkpoint-10")
    trainer = build(trained, toys.sentences(128), kind=Look)
    trainer.train(resume_from_checkpoint=str(trained / "checkpoint-5"))
    assert seen == [str(trained / "checkpoint-10")]
    check_whole(trained / "checkpoint-10")


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
