"""Models that are shared out over ranks: FSDP2 and DeepSpeed give the run that DDP and one process give.

FSDP2 runs on CPUs by a shim (``launched/fsdp2_on_cpu.py``). DeepSpeed runs there as it is, where it is installed, once
it is told the backend.
"""

import importlib.util
import json

import pytest
import torch
from launchers import ACCELERATE, ALONE, attempt, configured, launch, results

pytestmark = pytest.mark.slow

SCRIPT = "sharded.py"
UNIFORM = ("off", "off, accumulated")
IMPORTANCE = ("on", "on, accumulated", "switching")
# ZeRO-3 keeps parameters below a size whole on every rank; here none.
ZERO3_FILE = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
KINDS = ["fsdp2", "fsdp2_arguments", "zero2", "zero3", "zero3 file"]


def need_deepspeed():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


def start(kind, folder):
    """Run all cases, and give what the ranks wrote."""
    cases = [*UNIFORM, *IMPORTANCE, "saved", "resumed"]
    if kind in ("ddp", "fsdp2", "fsdp2_arguments"):
        launch(configured("fsdp2" if kind == "fsdp2" else "ddp"), SCRIPT, kind, folder, 2, *cases)
    else:
        need_deepspeed()
        command = configured(f"deepspeed_{kind}")
        if kind == "zero3 file":
            file = folder / "zero3"
            file.write_text(json.dumps(ZERO3_FILE))
            command = [*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", str(file), "--num_processes", "2"]
        # accelerate leaves DeepSpeed out where it is told that there are only CPUs.
        launch(command, SCRIPT, "zero", folder, 2, *cases, ACCELERATE_USE_CPU=None, DS_ACCELERATOR="cpu")
    return results(folder, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(ALONE, SCRIPT, "one", folder, 1)
    return results(folder, 1)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return start("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def sharded(kind, tmp_path_factory):
    return start(kind, tmp_path_factory.mktemp("sharded"))


def parameters(run):
    return torch.tensor(run["parameters"])


def test_the_parameters_are_shared_out_over_two_ranks(kind, sharded):
    assert len(sharded) == 7
    for name, ranks in sharded.items():
        for rank in ranks:
            assert rank["world"] == 2, name
            assert rank["kind"] == ("FSDP" if kind.startswith("fsdp2") else "DEEPSPEED")
            assert rank["sharded"] == (kind != "zero2"), name
            whole = len(rank["parameters"])
            here = {"fsdp2": whole / 2, "fsdp2_arguments": whole / 2, "zero3 file": 0}.get(kind, whole)
            assert rank["local"] == here, name


def test_the_ranks_agree(sharded):
    for name, (first, second) in sharded.items():
        for key in ("parameters", "tau", "switches"):
            assert first[key] == second[key], (name, key)
    assert sharded["switching"][0]["switches"] == 2


@pytest.mark.parametrize("case", UNIFORM)
def test_off_it_is_the_run_of_one_process(one, sharded, case):
    alone, together = one[case][0], sharded[case][0]
    torch.testing.assert_close(parameters(together), parameters(alone), rtol=0, atol=5e-7)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert together["tau"] == pytest.approx(alone["tau"], abs=1e-6)


@pytest.mark.parametrize("case", IMPORTANCE)
def test_it_is_the_run_of_ddp(ddp, sharded, case):
    plain, together = ddp[case][0], sharded[case][0]
    assert together["largest_weight"] > 1.2  # else the weights are not put to the test
    torch.testing.assert_close(parameters(together), parameters(plain), rtol=0, atol=5e-7)
    assert losses(together) == pytest.approx(losses(plain), rel=1e-5)
    assert together["tau"] == pytest.approx(plain["tau"], abs=1e-5)


def test_a_resumed_run_is_the_same_run(sharded):
    whole, resumed = sharded["saved"][0], sharded["resumed"][0]
    assert whole["parameters"] == resumed["parameters"]
    assert whole["tau"] == resumed["tau"]
    assert losses(whole)[-1] == losses(resumed)[-1]


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2"])
def test_gradient_norms_are_refused(tmp_path, name):
    variables = {}
    if name != "fsdp2":
        need_deepspeed()
        variables = {"ACCELERATE_USE_CPU": None, "DS_ACCELERATOR": "cpu"}
    kind = "fsdp2" if name == "fsdp2" else "zero"
    found = attempt(configured(name), SCRIPT, kind, tmp_path, 2, "gradient norm", **variables)
    assert found.returncode != 0
    assert "score='gradient_norm' needs the gradients of single examples" in found.stderr


def test_zero2_runs_in_one_process(one, tmp_path):
    need_deepspeed()
    command = [*configured("deepspeed_zero2"), "--num_processes", "1"]
    launch(command, SCRIPT, "zero", tmp_path, 1, *UNIFORM, "on", ACCELERATE_USE_CPU=None, DS_ACCELERATOR="cpu")
    for case, (run,) in results(tmp_path, 1).items():
        assert (run["world"], run["kind"]) == (1, "DEEPSPEED")
        torch.testing.assert_close(parameters(run), parameters(one[case][0]), rtol=0, atol=5e-7)


def losses(run):
    return [entry["loss"] for entry in run["history"] if "loss" in entry]
