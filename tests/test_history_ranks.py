"""History on two ranks, really launched: one table, one global sample, and the result of one process."""

import pytest
import torch
from launchers import ACCELERATE, ALONE, launch, results

COLUMNS = ("score", "age", "visits", "weight_sum")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(ALONE, "history_ranks.py", folder, 1)
    return results(folder, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch([*ACCELERATE, "--multi_gpu", "--num_processes", "2"], "history_ranks.py", folder, 2)
    return results(folder, 2)


def test_the_launch_made_one_world_of_two(two):
    assert {rank["world"] for ranks in two.values() for rank in ranks} == {2}
    assert all(rank["active"] for ranks in two.values() for rank in ranks)


@pytest.mark.parametrize("case", ["whole", "shrunk", "gathered"])
def test_every_rank_holds_the_same_table_and_decides_the_same(two, case):
    first, second = two[case]
    for name in (*COLUMNS, "gain", "passes", "parameters"):
        assert first[name] == second[name], name


@pytest.mark.parametrize("case", ["whole", "shrunk", "gathered"])
def test_each_rank_draws_its_own_share_of_a_pass(two, case):
    for first, second in zip(*(rank["trained"] for rank in two[case]), strict=True):
        assert len(first) == len(second)
        assert not set(first) & set(second)


def test_two_ranks_train_as_one_process_does(one, two):
    alone, together = one["whole"][0], two["whole"]
    # The same global sample, split: rows 0, 2, 4, ... of it on the first rank.
    for step, whole in enumerate(alone["trained"]):
        assert sorted(whole) == sorted(together[0]["trained"][step] + together[1]["trained"][step])
    assert alone["passes"] == together[0]["passes"] > 2
    assert alone["gain"] == pytest.approx(together[0]["gain"], rel=1e-9)
    found = [torch.tensor(run["parameters"]) for run in (alone, together[0])]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    for ours, theirs in zip(alone["log"], together[0]["log"], strict=True):
        for key in ("loss", "importance/tau", "importance/gain", "importance/examples_trained"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_ranks_gather_alike_and_meet_in_the_last_micro_batch_of_each_step(two):
    first, second = ([len(index) == 0 for index in run["trained"]] for run in two["gathered"])
    assert first == second and any(first) and not any(first[3::4])


def test_two_ranks_resume_to_the_last_bit(two):
    for whole, resumed in zip(two["whole"], two["resumed"], strict=True):
        assert whole["parameters"] == resumed["parameters"]
        assert whole["trained"][-len(resumed["trained"]) :] == resumed["trained"]
        for name in (*COLUMNS, "gain", "passes"):
            assert whole[name] == resumed[name], name


@pytest.mark.parametrize("case", ["whole", "shrunk"])
def test_one_rank_may_ask_for_the_table_alone(two, case):
    # Within the run it is as of the last exchange, behind it everything.
    first, second = two[case]
    trained = sum(len(batch) for rank in (first, second) for batch in rank["trained"])
    assert sum(first["visits"]) == trained
    assert len(first["asked"]) == 13 and second["asked"] == []
    assert first["asked"] == sorted(first["asked"])
    assert 0 < first["asked"][1] <= first["asked"][-1] < trained
