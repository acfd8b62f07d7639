"""Training gives what it gave when ``oracle.json`` was recorded, to the last bit; see ``oracle.py``.

Where floating point is another, as a plain Trainer shows, there is nothing to compare.
"""

import json
from pathlib import Path

import oracle
import pytest
import torch

RECORDED = json.loads((Path(__file__).parent / "oracle.json").read_text())
ALONE = [name for name, run in oracle.RUNS.items() if run.ranks == 1]
TOGETHER = [name for name, run in oracle.RUNS.items() if run.ranks > 1]


@pytest.fixture(scope="module", autouse=True)
def the_machine_computes_as_the_recorded_one():
    if oracle.versions() != RECORDED["versions"]:
        pytest.skip(f"recorded with {RECORDED['versions']}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if oracle.canary() != RECORDED["canary"]:
        pytest.skip("floating point differs from the recorded machine's")
    yield
    torch.set_num_threads(threads)


def check(names):
    for name, found in oracle.results(names):
        wrong, _ = oracle.differences(RECORDED["runs"][name], found)
        assert not wrong, "\n".join([name, *wrong])


def test_every_run_is_recorded():
    assert set(RECORDED["runs"]) == set(oracle.RUNS)


@pytest.mark.parametrize(
    "name", [name if name in oracle.FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALONE]
)
def test_a_run_trains_as_recorded(name):
    check([name])


@pytest.mark.slow
def test_two_ranks_train_as_recorded():
    check(TOGETHER)
