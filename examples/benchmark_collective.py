"""What several processes cost: the one collective of an optimizer step, and its share of the step.

    python examples/benchmark_collective.py                     # 2, 4 and 8 processes, gloo, CPUs
    python examples/benchmark_collective.py --processes 2 --repeats 3

Real training steps of a small BERT under DDP; what is timed is the collective where the trainer makes it, the wait for
slower ranks in it, and beside it the same collective alone, between processes that wait for nothing else. Worlds take
turns, so that a change of the machine's load meets all of them. The result stands in docs/distributed.md.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmark_step import make_model
from datasets import Dataset
from torch import Tensor
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting.markdown import table
from hf_importance.testing import leave_processes


@dataclass
class BenchmarkArguments:
    """What is measured, and how often."""

    processes: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Numbers of processes."})
    repeats: int = field(default=5, metadata={"help": "Runs of each number of processes."})
    steps: int = field(default=10, metadata={"help": "Timed steps a run, after 3 that are not."})
    batch_size: int = field(default=8, metadata={"help": "Examples a step and process."})
    use_cpu: bool = field(default=True, metadata={"help": "A small BERT; false: BERT-base, a GPU a process."})
    json: str | None = field(default=None, metadata={"help": "File that gets what was measured."})


class Timed:
    """A sum over ranks that adds up the seconds that this rank spends in it."""

    def __init__(self, reduce: Callable[..., Tensor]) -> None:
        self.reduce = reduce
        self.seconds, self.calls, self.numbers = 0.0, 0, 0

    def __call__(self, tensor: Tensor, *args: Any) -> Tensor:
        """Sum, and wait for it, but not for what the device had to do before."""
        if tensor.device.type != "cpu":
            torch.accelerator.synchronize()
        started = time.perf_counter()
        found = self.reduce(tensor, *args)
        found.tolist()
        self.seconds += time.perf_counter() - started
        self.calls += 1
        self.numbers = len(tensor)
        return found


class Steps(TrainerCallback):
    """Seconds of each step, and the seconds and number of sums over ranks in it."""

    def __init__(self) -> None:
        self.sums: Timed | None = None
        self.rows: list[tuple[float, float, int]] = []
        self.numbers = 0  # in the last one

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Keep the totals so far."""
        self.rows.append((time.perf_counter(), self.sums.seconds, self.sums.calls))
        self.numbers = self.sums.numbers

    def timed(self) -> list[tuple[float, float, int]]:
        """Give the difference of each step to the one before, after the third."""
        pairs = zip(self.rows[2:], self.rows[3:], strict=False)
        return [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairs]


def make_data(length: int, examples: int = 1024) -> Dataset:
    """Give random tokens: the time of a step does not depend on what they are."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 30000, (examples, length))
    labels = generator.integers(0, 10, examples)
    columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    return Dataset.from_dict(columns).with_format("torch")


def train(settings: BenchmarkArguments, on: bool) -> tuple[list[tuple[float, float, int]], int]:
    """Train, switched on from the second step or off throughout; give the steps and the numbers in a collective."""
    args = ImportanceTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.steps + 3,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=settings.use_cpu,
        bf16=not settings.use_cpu,
        dataloader_pin_memory=False,
        tau_threshold=1 + 1e-9 if on else 0.99 * settings.batch_size**0.5,
        importance_kwargs={"momentum": 0.0, "kappa": 1 / 3},  # nothing to be measured
    )
    steps = Steps()
    size, length = ("small", 32) if settings.use_cpu else ("full", 128)
    model, data = make_model("bert", size), make_data(length)
    trainer = ImportanceTrainer(model=model, args=args, train_dataset=data, callbacks=[steps])
    trainer.remove_callback(PrinterCallback)
    steps.sums = trainer.accelerator.reduce = Timed(trainer.accelerator.reduce)
    trainer.train()
    return steps.timed(), steps.numbers


def alone(numbers: int, device: torch.device | str, times: int = 200) -> float:
    """Give the median seconds of the collective by itself."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        tensor = torch.ones(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        tensor.tolist()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def work(rank: int, world: int, port: int, settings: BenchmarkArguments, queue) -> None:
    """Be one rank: measure, and let the first one tell."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, world, world, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    torch.set_num_threads(1)
    found = {}
    for phase in ("off", "on"):
        steps, numbers = train(settings, phase == "on")
        calls = {count for _, _, count in steps}
        found[phase] = {
            "step": statistics.median(seconds for seconds, _, _ in steps),
            "collective": statistics.median(seconds for _, seconds, _ in steps),
            "calls": calls,
            "numbers": numbers,
            "alone": alone(numbers, "cpu" if settings.use_cpu else f"cuda:{rank}"),
        }
    if rank == 0:
        queue.put(found)
    leave_processes()


def measure(world: int, port: int, settings: BenchmarkArguments) -> dict:
    """Give the first rank's figures of one run."""
    # Forked, imports are paid once, for this process itself computes nothing; but CUDA does not outlive a fork.
    method = "fork" if settings.use_cpu else "spawn"
    queue = mp.get_context(method).SimpleQueue()
    mp.start_processes(work, args=(world, port, settings, queue), nprocs=world, start_method=method)
    return queue.get()


def spread(values: list[float], factor: float, digits: int) -> str:
    """Give median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{factor * middle:.{digits}f} ({factor * low:.{digits}f} to {factor * high:.{digits}f})"


def main() -> None:
    """Print one table."""
    (settings,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    runs: dict[int, list[dict]] = {world: [] for world in settings.processes}
    for repeat in range(settings.repeats):
        order = settings.processes if repeat % 2 == 0 else settings.processes[::-1]
        for place, world in enumerate(order):
            found = measure(world, 29600 + repeat * len(order) + place, settings)
            runs[world].append(found)
            print(f"repeat {repeat + 1}, {world} processes, load {os.getloadavg()[0]:.1f}: {found}", flush=True)
    if settings.json:
        Path(settings.json).write_text(json.dumps({"processes": runs}, default=sorted))
    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores, batch {settings.batch_size} a process")
    print(f"median and range of {settings.repeats} runs of {settings.steps} steps\n")
    head = ["processes", "", "sums a step", "numbers", "step, ms", "in the collective, ms", "share, %", "alone, ms"]
    lines = []
    for world, found in runs.items():
        for phase in ("off", "on"):
            rows = [run[phase] for run in found]
            share = [row["collective"] / row["step"] for row in rows]
            calls = sorted(set.union(*(row["calls"] for row in rows)))
            took, within, alone = ([row[name] for row in rows] for name in ("step", "collective", "alone"))
            cells = [spread(took, 1e3, 0), spread(within, 1e3, 2), spread(share, 100, 2), spread(alone, 1e3, 2)]
            lines.append([world, phase, ", ".join(map(str, calls)), rows[0]["numbers"], *cells])
    print(table(head, lines, text=2))


if __name__ == "__main__":
    main()
