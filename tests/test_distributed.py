"""Two ranks, really launched: equal work gives an equal result, all take the same branch, and nothing hangs."""

import math
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toys
from launchers import ACCELERATE, ALONE, TORCHRUN, attempt, configured, launch, results
from transformers import TrainingArguments

from hf_importance import ImportanceTrainer
from hf_importance.theory.costs import ASSUMED_KAPPA

SCRIPT = "two_ranks.py"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(ALONE, SCRIPT, folder, 1)
    return results(folder, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(configured("ddp"), SCRIPT, folder, 2)
    return results(folder, 2)


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


REASONS = {
    "in the first step": "the loss is computed past ours",
    "while on": "the loss is computed past ours",
    "while on, by history": "the loss is computed past ours",
    "in a pool": "the batch entry 'extra' is one for the whole batch, and differs from batch to batch",
    "in its loader": "the loader reads the examples in an order",
}


def test_what_one_rank_finds_in_the_way_ends_it_on_both_and_neither_waits(tmp_path):
    launch(configured("ddp"), "one_rank.py", tmp_path, 2)
    found = results(tmp_path, 2)
    assert set(found) == set(REASONS)
    for name, ranks in found.items():
        first, second = (rank["ImportanceTrainer"] for rank in ranks)
        assert first["world"] == second["world"] == 2
        assert first["parameters"] == second["parameters"] and first["drawn"] == second["drawn"], name
        # It is said once, by the rank that knows.
        assert first["off"] == [] and len(second["off"]) == 1, name
        assert second["off"][0].startswith(REASONS[name])
        if "while on" in name:
            assert first["drawn"][-4] == 1 and first["drawn"][-1] == 0, name
        else:
            assert 1 not in first["drawn"]
            assert first["parameters"] == ranks[0]["Trainer"]["parameters"], name


SAME = ("uniform", "on")


def check_same(found, two):
    """The same run, however it was started."""
    for name in SAME:
        assert [rank["world"] for rank in found[name]] == [2, 2]
        for rank in range(2):
            assert found[name][rank]["parameters"] == two[name][rank]["parameters"]
            assert found[name][rank]["trained"] == two[name][rank]["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [TORCHRUN, [*ACCELERATE, "--multi_gpu", "--num_processes", "2"]])
def test_other_launch_commands_give_the_same_run(two, tmp_path, command):
    # Nothing but use_cpu=True in the script says that there is no GPU.
    launch(command, SCRIPT, tmp_path, 2, *SAME, ACCELERATE_USE_CPU=None)
    check_same(results(tmp_path, 2), two)


@pytest.mark.slow
def test_two_machines_give_the_same_run(two, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*configured("two_machines"), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]

    def start(rank):
        machine = [*command, "--num_processes", "2", "--machine_rank", str(rank)]
        launch(machine, SCRIPT, tmp_path, 2, *SAME, GLOO_SOCKET_IFNAME="lo")

    with ThreadPoolExecutor() as machines:
        list(machines.map(start, range(2)))
    check_same(results(tmp_path, 2), two)


@toys.since("1.13", "accelerate")  # before, processes without a GPU find each other without being told
def test_a_launch_that_ended_up_as_separate_runs_is_refused(tmp_path):
    command = [*ACCELERATE, "--multi_gpu", "--num_processes", "2"]
    found = attempt(command, "plain_script.py", tmp_path, ACCELERATE_USE_CPU=None)
    assert found.returncode != 0
    message = "started 2 processes (WORLD_SIZE=2), but this one trains alone (world size 1)"
    assert message in found.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 script.py" in found.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOCAL_RANK": "0", "WORLD_SIZE": "1"},  # torchrun with one process
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},  # four runs of one job, not one run
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "RANK": "0"},  # a cluster's variables for a launcher that nobody started
    ],
)
def test_one_process_that_nobody_launched_as_several_trains(tmp_path, monkeypatch, variables):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    args = toys.arguments(tmp_path, max_steps=1)
    assert args.world_size == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    toys.run(ImportanceTrainer, toys.bert(), args, toys.sentences())


def test_with_several_gpus_in_one_process_it_is_off(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    message = r"2 GPUs are visible to one process.*--multi_gpu --num_processes 2"
    toys.check_off(caplog, message, toys.bert, toys.arguments(tmp_path), toys.sentences(96))


def test_with_uneven_ranks_it_is_off(tmp_path, monkeypatch, caplog):
    args = toys.arguments(tmp_path, accelerator_config={"even_batches": False})
    monkeypatch.setattr(type(args), "world_size", 2)
    message = r"even_batches=False.*dataloader_drop_last=True"
    toys.check_off(caplog, message, toys.bert, args, toys.sentences(96))
