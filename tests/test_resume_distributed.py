"""Two ranks, really launched: they resume to the last bit, and where one is killed, the other ends too."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys

FOLDER = Path(__file__).parent / "launched"
LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
SECONDS = 240  # a hang is a failure
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@toys.since("5.19")  # before, the Trainer itself resumes on no two ranks without a GPU
def test_two_ranks_resume_to_the_last_bit(tmp_path):
    command = [sys.executable, *LAUNCHER, str(FOLDER / "resumed.py"), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(found) == 8  # four cases on two ranks
    for name, case in found.items():
        assert case["world"] == 2
        assert case["different"] == [], name
        # Rank 1 takes up the log of rank 0, which has the largest weight of its own pools.
        assert case["histories equal"] or name.endswith(".1"), name
        assert case["switches"][0] == case["switches"][1] == (0 if "off" in name else 1)
        assert case["stream"][0] == case["stream"][1]
    assert found["stream.0"]["stream"][0]["drawn"] == 1 + 9 * 3


@pytest.mark.slow
def test_where_one_rank_is_killed_the_launch_ends_with_an_error(tmp_path):
    command = [sys.executable, *LAUNCHER, str(FOLDER / "resumed.py"), str(tmp_path), "rank-dies"]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=SECONDS, capture_output=True, text=True)
    seconds = time.time() - float((tmp_path / "died").read_text())
    print(f"the launch ended {seconds:.1f} s after rank 1 was killed")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert seconds < 60


def run_killed(*arguments):
    command = [sys.executable, str(FOLDER / "killed.py"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=1700, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_three_random_moments_it_ends_as_if_nothing_had_been():
    (found,) = run_killed("--kills", "3")
    assert found["kills"] == 3
    assert found["switches_a_run"] > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_fifty_random_moments_it_ends_as_if_nothing_had_been(ranks):
    (found,) = run_killed("--kills", "50", "--ranks", str(ranks), "--seed", str(ranks))
    assert found["kills"] == 50
    assert set(found["killed_while"]) >= {"training", "scoring", "saving"}
    assert found["half_written"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_other_signals_while_scoring(signal):
    (found,) = run_killed("--kills", "5", "--signal", signal, "--while", "scoring")
    assert found["killed_while"] == {"scoring": 5}


@pytest.mark.slow
def test_of_two_ranks_the_one_that_is_left_ends_with_an_error_by_itself():
    (trials,) = run_killed("--kills", "0", "--one-rank", "6")
    assert all(trial["status"] == 1 and trial["seconds"] < 30 for trial in trials)
