"""Fine-tuning with importance sampling against plain ``Trainer``: at equal time, or the time of equal steps.

    python examples/presampling_equal_time.py --task sst2 --data path/to/data --models path/to/models
    python examples/presampling_equal_time.py --task clothing --compare steps --epochs 4 --seeds 1

The tasks are those of ``remembered_scores.py``. With ``--compare time`` every row trains for the seconds that the
plain Trainer needs for the task's epochs, and its learning rate falls with the time that is gone, so each has a whole
schedule. Time is that of the CPU where there is no accelerator, so that other programs do not count. Rows and seeds
are interleaved.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from remembered_scores import TASKS, Task, error
from transformers import HfArgumentParser, TrainerCallback

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting import markdown
from hf_importance.reporting.report import relative_compute
from hf_importance.reporting.spread import mean_and_spread, standard_error

AUTO = {"importance_method": "presample", "presample_ratio": "auto", "scoring_dtype": "bf16"}
PAPER = {"presample_ratio": 3.0, "tau_threshold": 2.0}
CHEAPER = {**AUTO, "importance_budget": "constant_variance"}
ROWS = {
    "plain": {"importance_sampling": False},
    # As sampler=Presample.paper(), and the same without replacement.
    "paper": {**PAPER, "importance_kwargs": {"resampling": "multinomial"}},
    "systematic": PAPER,
    "auto ratio": CHEAPER,
    "history": {"importance_method": "history", "importance_budget": "constant_variance"},
    "auto method": {**CHEAPER, "importance_method": "auto"},
    # The other budgets, and what the rest costs: the safety margin, the precision of scoring, and the replacement.
    "variance": {**AUTO, "importance_budget": "variance"},
    "constant time": {**AUTO, "importance_budget": "constant_time"},
    "no margin": {**CHEAPER, "importance_kwargs": {"margin": 1.0}},
    "margin 1.5": {**CHEAPER, "importance_kwargs": {"margin": 1.5}},
    "fp32 scores": {**CHEAPER, "scoring_dtype": "fp32"},
    "multinomial": {**CHEAPER, "importance_kwargs": {"resampling": "multinomial"}},
}


@dataclass
class Arguments:
    """What is trained, how long, and how often."""

    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    data: str = field(default=os.environ.get("HF_IMPORTANCE_DATA", "data"), metadata={"help": "Folder of the tasks."})
    models: str = field(default=os.environ.get("HF_IMPORTANCE_MODELS", "models"), metadata={"help": "Of the models."})
    compare: str = field(default="time", metadata={"help": "At equal 'time', or at equal 'steps'."})
    epochs: float | None = field(default=None, metadata={"help": "Of the plain Trainer. By default the task's."})
    batch_norm: str = field(default="untouched", metadata={"help": "Of all rows."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of all rows. By default the task's."})
    seeds: int = field(default=3, metadata={"help": "Runs of each row."})
    first_seed: int = field(default=0, metadata={"help": "The seed of the first."})
    rows: list[str] = field(default_factory=lambda: list(ROWS)[:6], metadata={"help": f"Of {list(ROWS)}."})
    validation: bool = field(default=False, metadata={"help": "Test on the examples that choices are made by."})
    results: str | None = field(default=None, metadata={"help": "File that gets one line of JSON a run."})
    report: bool = field(default=False, metadata={"help": "Print the table of a file of results, and train nothing."})


def now() -> float:
    """Give the time in seconds: of the wall with an accelerator, else of this process's CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


class Clock(TrainerCallback):
    """Measures the time of training; where it is given a budget, lets the learning rate fall over it and stops."""

    def __init__(self, learning_rate: float, seconds: float | None) -> None:
        self.learning_rate, self.seconds = learning_rate, seconds
        self.spent = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start."""
        self.started = now()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Set the learning rate: up in the first 5 % of the time, then down to 0."""
        if self.seconds is not None:
            gone = (now() - self.started) / self.seconds
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * max(min(gone / 0.05, (1 - gone) / 0.95), 0.0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop at the end of the time, and log the last step too."""
        self.spent = now() - self.started
        if self.seconds is not None and self.spent >= self.seconds:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step == state.max_steps:
            control.should_log = True


def run(name: str, arguments: Arguments, task: Task, seed: int, steps: int, seconds: float | None) -> dict:
    """Train one row once, and give its figures."""
    transformers.set_seed(seed)
    timed = seconds is not None
    own = {} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate}
    given = ImportanceTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        **{name: value for name, value in task.arguments.items() if name != "num_train_epochs"} | own,
        batch_norm=arguments.batch_norm,
        per_device_eval_batch_size=128,
        max_steps=50 * steps if timed else steps,
        lr_scheduler_type="constant" if timed else "linear",
        seed=seed,
        logging_steps=20,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        importance_log="all",
        dataloader_pin_memory=torch.accelerator.is_available(),
        **ROWS[name],
    )
    clock = Clock(given.learning_rate, seconds)
    trainer = ImportanceTrainer(
        task.model(), given, data_collator=task.collator, train_dataset=task.train, callbacks=[clock],
        compute_metrics=lambda found: {"error": error(found.predictions, found.label_ids)},
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    last, done = entries[-1], trainer.state.global_step
    on_train, on_test = trainer.evaluate(task.train), trainer.evaluate(task.test)
    return {
        "train loss": on_train["eval_loss"],
        "test loss": on_test["eval_loss"],
        "test error": on_test["eval_error"],
        "steps": done,
        "seconds": clock.spent,
        "compute": relative_compute(last) if "importance/tau" in last else 1.0,
        "on": statistics.mean(entry.get("importance/active_share", 0.0) for entry in entries),
        "tau": max(entry.get("importance/tau", 1.0) for entry in entries),
        "kappa": last.get("importance/kappa", float("nan")),
    }


def table(runs: list[dict]) -> None:
    """Print mean and standard error of each figure, a line a row."""
    plain = {found["seed"]: found["seconds"] for found in runs if found["row"] == "plain"}
    names = [name for name in runs[0] if name not in ("row", "seed", *vars(Arguments("")))]
    lines = []
    for row in sorted({found["row"] for found in runs}, key=list(ROWS).index):
        own = [found for found in runs if found["row"] == row]
        columns = [[found[name] for found in own] for name in names]
        columns.append([found["seconds"] / plain[found["seed"]] for found in own if found["seed"] in plain])
        lines.append([row, len(own), *(mean_and_spread(values, standard_error) for values in columns)])
    print()
    print(markdown.table(["", "seeds", *names, "seconds / plain"], lines))


def main() -> None:
    """Run all rows, seeds interleaved, and print the table."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.report:
        table([json.loads(line) for line in Path(arguments.results).read_text().splitlines()])
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not Path(arguments.data).is_dir():
        raise SystemExit(f"There is no folder {arguments.data}. Say where the data is: --data or HF_IMPORTANCE_DATA.")
    task = TASKS[arguments.task](Path(arguments.data), Path(arguments.models))
    if arguments.validation:
        task.test = task.validation()
    settings, seconds = task.arguments, None
    in_epoch = -(-len(task.train) // settings["per_device_train_batch_size"])
    steps = round(in_epoch * (arguments.epochs or settings["num_train_epochs"]))
    if arguments.compare == "time":
        pilot = run("plain", arguments, task, seed=0, steps=min(steps, 30), seconds=None)
        seconds = pilot["seconds"] / pilot["steps"] * steps
        print(f"Every run trains for {seconds:.0f} s, what {steps} plain steps take.", flush=True)
    runs = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for turn in range(len(arguments.rows)):
            name = arguments.rows[(turn + seed) % len(arguments.rows)]
            runs.append({"row": name, "seed": seed, **run(name, arguments, task, seed, steps, seconds)})
            shown = {key: round(value, 4) for key, value in runs[-1].items() if not isinstance(value, str)}
            print(name, shown, flush=True)
            if arguments.results:
                with open(arguments.results, "a") as file:
                    file.write(json.dumps({**runs[-1], **vars(arguments)}) + "\n")
    print(f"\n{arguments}\ntorch {torch.__version__}, transformers {transformers.__version__}")
    table(runs)


if __name__ == "__main__":
    main()
