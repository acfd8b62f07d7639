"""The command for a GPU: every part runs with tiny models, goes on where it was ended, and says what is missing."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_examples import EXAMPLES, REAL, run

sys.path.append(str(EXAMPLES))
import gpu
import gpu_report
import natural_data

# peft's own: it still says gradient_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
PARTS = [part.name for part in gpu.PARTS if part.name.partition("-")[0] not in ("finetune", "collective")]
NEEDS_PEFT = [name for name in PARTS if "lora" in name] if importlib.util.find_spec("peft") is None else []


def test_every_part_runs_and_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    # One run is ended by its time before the first part: nothing fits, and that is said.
    run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--minutes", 0, "--parts", "step-bert")
    assert "step-bert: skipped, it takes 35 s and 0 s were left" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))
    measures = ["step", "kappa", "alpha", "waits"]
    run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--minutes", 60, "--parts", *measures)
    files = {name: tmp_path / f"{name}.json" for name in PARTS}
    assert [name for name, file in files.items() if not file.exists()] == NEEDS_PEFT
    assert all(f"{name}: skipped, peft is not installed" in capsys.readouterr().out for name in NEEDS_PEFT[:1])
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    check_figures(found)
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("`--quick`") and "| bert, checkpointing |" in text and "| llama, `aten::_local" in text
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    # What is there is left out, unless it is asked for again.
    written = {name: files[name].stat().st_mtime_ns for name in found}
    run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--parts", "waits", "alpha-bert")
    assert {name: files[name].stat().st_mtime_ns for name in found} == written
    run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--parts", "waits-bert", "--again")
    changed = [name for name in found if files[name].stat().st_mtime_ns != written[name]]
    assert changed == ["waits-bert"]


def check_figures(found):
    """Hold what was measured, whatever the machine, to what must be so."""
    for name, part in found.items():
        kind = name.partition("-")[0]
        if kind == "step":
            assert part["ms"].keys() == {"plain", "off", "3b to b", "2b to b/2"}
            assert part["over plain"]["plain"] == [1, 1, 1]
            # It scores three batches and trains on one: more than a plain step, whatever a machine does.
            assert part["over plain"]["3b to b"][0] > 1
        if kind == "kappa":
            middle, low, high = part["kappa"]
            assert 0 < low <= middle <= high and 0 < part["own kappa"] < 1
        if kind == "alpha":
            assert 0 <= part["alpha"][0] <= 1
        if kind == "waits":
            plain, off, on = (part["a step"][side]["aten::_local_scalar_dense"] for side in ("plain", "off", "on"))
            assert 2 <= plain <= off <= on  # plain looks whether its loss is NaN or infinite


def test_a_part_that_fails_is_said_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def fail(settings, budget):
        os.environ["LEFT_BY_A_PART"] = "1"
        raise ZeroDivisionError

    parts = [gpu.Part("step-one", fail, 1), gpu.Part("step-two", lambda *_: {"figure": 1}, 1)]
    monkeypatch.setattr(gpu, "PARTS", parts)
    left_out, failed = gpu.measure_all(gpu.Settings(str(tmp_path)))
    assert (left_out, failed) == ({}, ["step-one"]) and "ZeroDivisionError" in capsys.readouterr().err
    assert json.loads((tmp_path / "step-two.json").read_text())["figure"] == 1
    assert "LEFT_BY_A_PART" not in os.environ
    # It is tried again, and figures of tiny models do not stand for those of real ones.
    assert gpu.measure_all(gpu.Settings(str(tmp_path)))[1] == ["step-one"]
    assert "step-two: done before" in capsys.readouterr().out
    gpu.measure_all(gpu.Settings(str(tmp_path), quick=True))
    assert "step-two: done before" not in capsys.readouterr().out


def test_an_unknown_part_is_named_with_those_that_are(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"There is no part stop, only step-bert, "):
        run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--parts", "stop")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_fixed_share_of_times_that_have_one_is_found(share):
    sizes = [4, 8, 32]
    assert gpu.fixed_share(sizes, [0.7 * (share + (1 - share) * n / 32) for n in sizes]) == pytest.approx(share)


def test_rounds_take_turns_warm_up_and_end_with_the_time():
    order = []
    found = gpu.in_rounds({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 60, False)
    assert "".join(order) == "ba" + "abba" * 2 + "ab" and found == {"a": [3, 6, 7, 10, 11], "b": [4, 5, 8, 9, 12]}
    order.clear()
    gpu.in_rounds({"a": lambda: order.append(time.sleep(0.05))}, 0.12, False)
    assert len(order) == 2  # one to warm up, and one that counts; a third would not fit


def test_waits_that_are_known_are_counted():
    profiled = gpu.Profiled(steps=2)
    state = type("State", (), {})()
    for state.global_step in range(1, gpu.WARM_UP + 4):
        torch.ones(3).nonzero(), [torch.ones(()).item() for _ in range(3)]
        profiled.on_step_end(None, state, None)
    assert profiled.counts["aten::_local_scalar_dense"] == 3 and profiled.counts["aten::nonzero"] == 1


def test_texts_have_the_lengths_and_frequencies_of_real_ones():
    rows = natural_data.texts(4000, 128, 30522, 10, even=False)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    # By the table: half of the speeches have at most 22 tokens, and 5.2 % more than 128.
    assert abs(np.median(lengths) - 22) <= 1 and lengths.max() == 128 and abs((lengths == 128).mean() - 0.052) < 0.015
    ids = torch.cat([row["input_ids"] for row in rows]).numpy()
    for rank, share in natural_data.FREQUENT.items():
        assert (ids <= rank).mean() == pytest.approx(share, abs=0.01)
    batch = natural_data.pad(rows[:8])
    assert batch["input_ids"].shape == (8, lengths[:8].max()) and batch["labels"].shape == (8,)
    assert batch["attention_mask"].sum(1).tolist() == lengths[:8].tolist()
    assert {len(row["input_ids"]) for row in natural_data.texts(20, 32, 256, 10, even=True)} == {32}


def test_photographs_have_the_spectrum_of_real_ones():
    pixels = torch.stack([row["pixel_values"] for row in natural_data.photographs(8, 128, 10)]).numpy()
    assert abs(pixels.mean()) < 0.05 and 0.9 < pixels.std() < 1.02  # a little is cut off at black and white
    amplitude = np.abs(np.fft.fft2(pixels)).mean((0, 1))[0]
    slope = np.polyfit(np.log(np.arange(2, 30)), np.log(amplitude[2:30]), 1)[0]
    assert -1.2 < slope < -0.8


def test_the_table_gives_what_is_predicted_and_what_lacks(tmp_path):
    machine = {"device": "one", "torch": "2", "transformers": "5", "commit": "c", "quick": False, "seconds": 1}
    ratios = {"plain": [1, 1, 1], "off": [1.01, 1, 1.02], "3b to b": [2.1, 2, 2.2], "2b to b/2": [1.4, 1.3, 1.5]}
    peaks = {side: 1024.0 for side in (*ratios, "3b to b, scoring", "2b to b/2, scoring")}
    step = {"batch": 32, "rounds": 5, "ms": ratios, "over plain": ratios, "peak MiB": peaks}
    kappa = {"ms to score": [1, 1, 1], "ms to train": [4, 4, 4], "kappa": [0.25, 0.2, 0.3], "own kappa": None}
    runs = [{"off": {"step": 0.1, "collective": 0.002}, "on": {"step": 0.2, "collective": 0.002}}]
    side = {"test error": 0.1, "train loss": 0.2, "compute": 0.5, "seconds": 3.0}
    parts = {
        "step-vit": step,
        "kappa-vit-bf16": kappa,
        "collective": {"processes": {"8": runs}},
        "finetune-sst2-0": {"plain": side, "auto method": side},
        "finetune-sst2-1": {"plain": {**side, "compute": 1.5}, "auto method": side},
    }
    for name, found in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**found, **machine}))
    text = gpu_report.report(tmp_path, False, list(parts), {"alpha-vit": "no time"}, ["waits-vit"])
    # 1 + 3 * 0.25.
    assert "| vit | 32 | 1.0 [1.0, 1.0] | 1.010 [1.000, 1.020] | 2.100 [2.000, 2.200] | 1.750 |" in text
    assert "| vit, bf16 | 1.000 [1.000, 1.000] | 4.000 [4.000, 4.000] | 0.250 [0.200, 0.300] | – |" in text
    assert "| 8, off | 100.0 | 2.00 | 2.00 % |" in text
    assert "| sst2, plain | 2 | 0.1 ± 0 | 0.2 ± 0 | 1 ± 0.71 | 3 ± 0 |" in text
    assert "- not measured: alpha-vit, no time\n- not measured: waits-vit, it failed\n" in text
    assert "one, torch 2, transformers 5, commit c" in text and "--quick" not in text


@pytest.mark.slow  # two processes
def test_the_collective_is_measured_by_processes_of_their_own(tmp_path, monkeypatch):
    run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--parts", "collective")
    (runs,) = json.loads((tmp_path / "collective.json").read_text())["processes"]["2"]
    assert all(0 < runs[phase]["collective"] < runs[phase]["step"] for phase in ("off", "on"))


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="HF_IMPORTANCE_DATA names no folder with data/ and models/")
def test_fine_tuning_runs_on_real_data(tmp_path, monkeypatch):
    folders = ["--data", Path(REAL, "data"), "--models", Path(REAL, "models")]
    run(monkeypatch, "gpu", "--quick", "--out", tmp_path, "--parts", "finetune-clothing-0", *folders)
    found = json.loads((tmp_path / "finetune-clothing-0.json").read_text())
    assert found["plain"]["compute"] == 1 and found["plain"]["steps"] == found["auto method"]["steps"] > 0
