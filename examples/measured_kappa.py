"""What the trainer measures beside other programs: κ while it is off, and κ and α while pools are scored.

    python examples/measured_kappa.py --data path/to/data --models path/to/models --tasks sst2 fashion --busy 0 2 4 1

For each number in ``--busy``, which is how many loops keep a core busy beside it and do nothing else: a run that gives
κ by single batches (``importance_method="observe"``: the plain Trainer's), and one by pools from the sixth step on,
which gives α too. Data and models as ``remembered_scores.py`` wants them; one thread.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from remembered_scores import TASKS, Task

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting.markdown import lines

# Whatever it costs, so that it is on.
ALWAYS = {"on_below": 1e9, "off_above": 1e9}
KINDS = {
    "off": {"importance_method": "observe"},
    "on": {"importance_method": "presample", "importance_kwargs": ALWAYS},
}


@contextlib.contextmanager
def beside(programs: int) -> Iterator[None]:
    """Keep so many cores busy inside the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()
            loop.wait()


def measure(task: Task, kind: str, steps: int) -> list[float]:
    """Train, and give κ, and where pools were scored α."""
    transformers.set_seed(0)
    arguments = {name: value for name, value in task.arguments.items() if name != "num_train_epochs"}
    with tempfile.TemporaryDirectory() as folder:
        args = ImportanceTrainingArguments(
            folder, **arguments, **KINDS[kind], max_steps=steps, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_steps=steps, dataloader_pin_memory=torch.accelerator.is_available(),
        )  # fmt: skip
        trainer = ImportanceTrainer(task.model(), args, data_collator=task.collator, train_dataset=task.train)
        trainer.remove_callback(transformers.PrinterCallback)
        with contextlib.redirect_stdout(None):
            trainer.train()
    clock = trainer.sampler.run.clock
    return [clock.kappa] if clock.overhead is None else [clock.kappa, clock.overhead]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "models"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2", "fashion"])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 2, 4, 1])
    parser.add_argument("--steps", type=int, default=60)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    beside_it = [f"{busy} beside" for busy in settings.busy]
    head = ["task", "measured", *beside_it, "largest / smallest", "load"]
    for line in lines(head, rows(settings), text=2):
        print(line, flush=True)


def rows(settings: argparse.Namespace) -> Iterator[list[str]]:
    """Measure, and give the cells of a line when they are there."""
    for name in settings.tasks:
        task = TASKS[name](settings.data, settings.models)
        for kind in KINDS:
            found = []
            for busy in settings.busy:
                with beside(busy):
                    found.append(measure(task, kind, settings.steps))
            for what, values in zip(("κ", "α"), zip(*found, strict=True), strict=False):
                ratio = max(values) / min(values) if min(values) > 0 else float("inf")
                cells = [f"{value:.3f}" for value in (*values, ratio)]
                yield [name, f"{what}, {kind}", *cells, f"{os.getloadavg()[0]:.1f}"]


if __name__ == "__main__":
    main()
