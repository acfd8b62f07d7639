"""Nothing of ours makes the host wait for the device: counted on a stand-in for one, in real steps."""

import collections
import json
import sys
from pathlib import Path

import pytest
from launchers import ALONE, launch

sys.path.insert(0, str(Path(__file__).parent / "launched"))

import waits

STEPS = waits.LAST - waits.FIRST


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waits")
    launch(ALONE, "waits.py", folder, ACCELERATE_USE_CPU=None, ACCELERATE_TORCH_DEVICE="standin:0")
    return json.loads((folder / "waits.json").read_text())


def per_step(found, timed=False):
    """Waits a step by kind, without what a model asks for in each forward pass: whether its mask masks anything.

    ``timed``: without those for the times of one step in 16, too.
    """
    left_out = ("transformers/masking_utils.py", *(["hf_importance/transfer.py:seconds_between"] if timed else []))
    kinds = collections.Counter()
    for kind, place, number in found["waits"]:
        if not place.startswith(left_out):
            kinds[kind] += number / STEPS
    return dict(kinds)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_plain_trainer_waits_twice_a_micro_batch(counted, accumulation):
    assert per_step(counted[f"plain, {accumulation}"]) == {"item": 2 * accumulation}


@pytest.mark.parametrize(
    ("way", "accumulation"),
    [case for case in waits.CASES if case[0] in ("off", "history", "auto", "class weights, history")],
)
def test_off_and_history_add_no_wait(counted, way, accumulation):
    found = counted[f"{way}, {accumulation}"]
    assert found["drawn"] == {"off": None, "history": "on", "auto": "history"}.get(way, "on")
    assert per_step(found) == {**per_step(counted[f"plain, {accumulation}"]), "event": 1}
    # The host asks for what the device did before the last backward pass, and has given it all of that since.
    assert min(found["behind"]) > counted[f"plain, {accumulation}"]["operations"] / STEPS / (2 * accumulation)


DRAWN = [case for case in waits.CASES if case[0].startswith("on") or case[0] == "class weights"]


@pytest.mark.parametrize(("way", "accumulation"), DRAWN)
def test_on_adds_one(counted, way, accumulation):
    found = counted[f"{way}, {accumulation}"]
    assert found["steps_on"] >= waits.LAST + 2 - waits.FIRST  # so that all of those that are counted are drawn
    assert per_step(found, timed=True) == {**per_step(counted[f"plain, {accumulation}"]), "event": 1}


def test_each_number_of_a_pool_is_copied_to_the_device_once(counted):
    # An example has 6 tokens, a mask of 6 and a label, and a pool 3 batches; weights and rows are a few more.
    plain, on, prepared = (counted[f"{way}, 1"]["moved"] / STEPS for way in ("plain", "on", "on, inputs of its own"))
    assert plain == pytest.approx(16 * 13, abs=4)
    assert 3 * plain <= on <= 3 * plain + 4 * 16
    assert prepared == on  # the user's code is done twice to what is kept, on the device


@pytest.mark.parametrize("way", ["off", "on", "history"])
def test_what_is_read_has_come(counted, tmp_path, way):
    # What is read too early is NaN on the stand-in, and what lies on the wrong device is refused.
    there = counted[f"{way}, 2"]
    here = waits.result(waits.trained(tmp_path, way, 2, []))
    assert {name: there[name] for name in ("drawn", "steps_on")} == {
        name: here[name] for name in ("drawn", "steps_on")
    }
    assert there["parameters"] == pytest.approx(here["parameters"], rel=1e-6)
