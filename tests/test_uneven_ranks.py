"""Ranks whose data end at different times: all take the same steps, or are told why not; none waits for ever."""

import pytest
from launchers import attempt, configured, results

pytestmark = pytest.mark.slow

SCRIPT = "uneven.py"
SECONDS = 120  # a hang is a failure


def start(wrapper, folder, case, phase):
    return attempt(configured("ddp"), SCRIPT, wrapper, folder, case, phase, seconds=SECONDS)


@pytest.mark.parametrize("phase", ["off", "on"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("case", "steps"), [("stream", 12), ("accumulated stream", 8), ("dropped", 6)])
def test_all_ranks_take_the_same_steps(tmp_path, wrapper, case, steps, phase):
    # In step 12 of "stream" the plain Trainer's ranks are in different epochs; "accumulated stream" stops it: one rank
    # takes a step that the other does not.
    found = start(wrapper, tmp_path, case, phase)
    assert found.returncode == 0, found.stderr[-5000:]
    kind = "FSDP" if wrapper == "fsdp2" else "MULTI_CPU"
    assert results(tmp_path, 2)[case] == [{"world": 2, "steps": steps, "kind": kind}] * 2


@pytest.mark.parametrize("phase", ["off", "on"])
def test_a_rank_without_data_ends_the_run(tmp_path, phase):
    found = start("ddp", tmp_path, "an empty shard", phase)
    assert found.returncode == 0, found.stderr[-5000:]
    assert [rank["steps"] for rank in results(tmp_path, 2)["an empty shard"]] == [0, 0]
    assert "not to be a single sample" in found.stderr + found.stdout


def test_loaders_of_different_length_are_refused(tmp_path):
    found = start("ddp", tmp_path, "own loaders", "off")
    assert found.returncode != 0
    assert "The train dataloaders of the ranks have [6, 4] batches" in found.stderr
