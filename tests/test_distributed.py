"""Two ranks, really launched: equal work gives an equal result, all take the same branch, and nothing hangs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys

from hf_importance import ImportanceTrainer
from hf_importance.costs import ASSUMED_KAPPA

SCRIPT = Path(__file__).parent / "launched" / "two_ranks.py"
SECONDS = 240  # a hang is a failure


def launch(command: list[str], folder: Path, ranks: int) -> dict[str, list[dict]]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(SCRIPT), str(folder), str(ranks)],
        env=environment,
        timeout=SECONDS,
        check=True,
        capture_output=True,
    )
    names = {file.name.rsplit(".", 2)[0] for file in folder.glob("*.json")}
    return {n: [json.loads((folder / f"{n}.{rank}.json").read_text()) for rank in range(ranks)] for n in names}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch([sys.executable], tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    # Without --multi_gpu accelerate starts one process and says nothing; without ACCELERATE_USE_CPU two separate runs.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    return launch([sys.executable, *launcher], tmp_path_factory.mktemp("two"), 2)


def test_the_launch_made_one_world_of_two(two):
    assert len(two) == 12
    assert {rank["world"] for ranks in two.values() for rank in ranks} == {2}


def test_the_ranks_end_with_the_same_parameters_tau_and_switches(two):
    for name, (first, second) in two.items():
        assert first["parameters"] == second["parameters"], name
        assert first.get("tau") == second.get("tau"), name
        ours = [[e for e in rank["history"] if "importance/switches" in e] for rank in (first, second)]
        keys = ("importance/active", "importance/switches", "importance/tau", "step")
        assert [[e[k] for k in keys] for e in ours[0]] == [[e[k] for k in keys] for e in ours[1]], name


@pytest.mark.parametrize("name", ["uniform", "uniform, accumulated", "counted on each rank", "honours the item count"])
def test_equal_work_gives_an_equal_result_while_off(one, two, name):
    # BERT ignores num_items_in_batch, ViT honours it: both have the right scale on two ranks.
    alone, together = one[name][0], two[name][0]
    torch.testing.assert_close(
        torch.tensor(alone["parameters"]), torch.tensor(together["parameters"]), rtol=0, atol=1e-7
    )
    losses = [[e["loss"] for e in run["history"] if "loss" in e] for run in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if "tau" in alone:
        assert alone["tau"] == pytest.approx(together["tau"], abs=1e-6)


@pytest.mark.parametrize("name", ["on", "on, accumulated", "on, counted on each rank"])
def test_the_loss_has_the_scale_of_one_rank_while_on(two, name):
    for entry in (e for e in two[name][0]["history"] if "loss" in e):
        assert entry["loss"] == pytest.approx(math.log(4), rel=0.1)
    assert entry["importance/active_share"] == 1


def test_ranks_draw_different_examples_and_counts_cover_both(two):
    first, second = two["on"]
    assert all(a != b for a, b in zip(first["trained"][1:], second["trained"][1:], strict=True))
    last = next(e for e in reversed(first["history"]) if "loss" in e)
    assert last["importance/examples_trained"] == 6 * 16
    assert last["importance/examples_scored"] == 5 * 48


def test_ranks_agree_on_what_scoring_costs(two):
    first, second = two["follows kappa"]
    assert first["kappa"] == second["kappa"] != ASSUMED_KAPPA
    sizes = [[len(batch) for batch in rank["trained"]] for rank in (first, second)]
    assert sizes[0] == sizes[1]
    assert min(sizes[0]) < 8


@pytest.mark.parametrize("name", ["uneven", "split batches", "dispatched", "stream"])
def test_uneven_data_hangs_nowhere(two, name):
    assert two[name][0]["steps"] == two[name][1]["steps"] > 0


def test_uneven_ranks_are_refused(tmp_path, monkeypatch):
    args = toys.arguments(tmp_path, accelerator_config={"even_batches": False})
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match=r"even_batches=False.*dataloader_drop_last=True"):
        ImportanceTrainer(toys.vit(), args)
