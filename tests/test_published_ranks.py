"""The published methods on two ranks, really launched: one table, one global draw, and the result of one process."""

import pytest
import torch
from launchers import ACCELERATE, ALONE, launch, results

pytestmark = pytest.mark.slow  # 50 s on two shared CPU cores


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(ALONE, "published_ranks.py", folder, 1)
    return results(folder, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch([*ACCELERATE, "--multi_gpu", "--num_processes", "2"], "published_ranks.py", folder, 2)
    return results(folder, 2)


@pytest.mark.parametrize("case", ["prioritized", "ranked", "uneven", "info_batch"])
def test_every_rank_holds_the_same_table_and_parameters(two, case):
    first, second = two[case]
    assert first["world"] == second["world"] == 2
    for name in ("table", "parameters"):
        assert first[name] == second[name], name
    assert first["trained"] != second["trained"]


@pytest.mark.parametrize("case", ["prioritized", "ranked"])
def test_two_ranks_train_as_one_process_does(one, two, case):
    alone, together = one[case][0], two[case]
    for step, whole in enumerate(alone["trained"]):
        assert sorted(whole) == sorted(together[0]["trained"][step] + together[1]["trained"][step]), step
    found = [torch.tensor(run["parameters"]) for run in (alone, together[0])]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert alone["table"]["visits"] == together[0]["table"]["visits"]
    keys = ["loss", *(f"importance/{name}" for name in ("tau", "examples_scored", "examples_trained", "table_age"))]
    for ours, theirs in zip(alone["log"], together[0]["log"], strict=True):
        # What ranks have seen crosses the network at draws: in between one process knows a step more.
        for key in keys if case == "ranked" and ours["step"] % 5 == 1 else keys[:-1]:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_an_example_that_is_left_over_is_scored_twice(one, two):
    scored = [runs["uneven"][0]["log"][-1]["importance/examples_scored"] for runs in (one, two)]
    assert scored[0] % 127 == 0 and scored[1] == scored[0] // 127 * 128
    assert not any(score != score for score in two["uneven"][0]["table"]["score"])


def test_two_ranks_resume_to_the_last_bit(two):
    for whole, resumed in zip(two["prioritized"], two["resumed"], strict=True):
        assert whole["parameters"] == resumed["parameters"]
        assert whole["table"] == resumed["table"]
        assert whole["trained"][-len(resumed["trained"]) :] == resumed["trained"]
