"""Starts scripts of ``tests/launched/`` as several processes, and reads back what each rank wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "distributed"
SECONDS = 240  # a hang is a failure

ALONE = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def configured(name: str) -> list[str]:
    """Give the command for a configuration file of ``examples/distributed/``."""
    return [*ACCELERATE, "--config_file", str(CONFIGS / f"{name}.yaml")]


def environment(**overrides: str | None) -> dict[str, str]:
    """Give the variables for CPUs; None takes one out."""
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **overrides}
    return {name: value for name, value in variables.items() if value is not None}


def launch(command: list[str], script: str, *arguments: object, seconds: float = SECONDS, **variables: str | None):
    """Run a script to its end, and fail with what it printed if it fails."""
    found = attempt(command, script, *arguments, seconds=seconds, **variables)
    assert found.returncode == 0, found.stderr[-5000:]


def attempt(command: list[str], script: str, *arguments: object, seconds: float = SECONDS, **variables: str | None):
    """Run a script to its end, however it ends."""
    process = subprocess.Popen(
        [*command, str(HERE / "launched" / script), *map(str, arguments)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # a launcher ends its processes when it is told to, not when it is killed
        process.wait(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def results(folder: Path, ranks: int) -> dict[str, list[dict]]:
    """Give what each rank wrote, by case."""
    names = {file.name.rsplit(".", 2)[0] for file in folder.glob("*.json")}
    return {n: [json.loads((folder / f"{n}.{rank}.json").read_text()) for rank in range(ranks)] for n in names}
