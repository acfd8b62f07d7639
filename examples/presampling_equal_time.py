"""Fine-tuning with fresh scores against plain ``Trainer``: at equal time, or at equal steps and in how much time.

    python examples/presampling_equal_time.py --task sst2 --data path/to/data --models path/to/models
    python examples/presampling_equal_time.py --task clothing --compare steps --examples 1500 --steps 300 --seeds 1

``--data`` (or the environment variable HF_IMPORTANCE_DATA) is a folder with one folder a task, each with train.parquet
and test.parquet; ``--models`` (or HF_IMPORTANCE_MODELS, or the folder ``models`` beside it) one with the models.

With ``--compare time`` every row trains for the seconds that the plain Trainer needs for ``--steps``, and its learning
rate falls with the time that is gone, so each has a whole schedule. Time is that of the CPU where there is no
accelerator, so that other programs do not count. Seeds are interleaved. BatchNorm is frozen, for all rows alike.
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

import datasets
import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainerCallback,
    default_data_collator,
)

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments

AUTO = {"presample_ratio": "auto", "tau_threshold": "auto", "scoring_dtype": "bf16"}
ROWS = {
    "plain": {"importance_sampling": False},
    "paper": {"resampling": "multinomial", "presample_ratio": 3.0},
    "systematic": {"resampling": "systematic", "presample_ratio": 3.0},
    "auto, variance": {**AUTO, "importance_budget": "variance"},
    "auto, constant variance": {**AUTO, "importance_budget": "constant_variance"},
    "auto, constant time": {**AUTO, "importance_budget": "constant_time"},
    # What the rest costs: the safety margin, and the precision of scoring.
    "no margin": {**AUTO, "importance_budget": "constant_variance", "variance_margin": 1.0},
    "margin 1.5": {**AUTO, "importance_budget": "constant_variance", "variance_margin": 1.5},
    "fp32 scores": {**AUTO, "importance_budget": "constant_variance", "scoring_dtype": "fp32"},
}
TASKS = {
    "sst2": {"data": "sst2_sentences", "model": "minilm-l6-h384-fp16", "learning_rate": 1e-4},
    "clinc": {"data": "clinc150", "model": "minilm-l6-h384-fp16", "learning_rate": 1e-4},
    "clothing": {"data": "clothing10_128px", "model": "mobilenet_v2_0.35_imagenet", "learning_rate": 3e-4},
    "cifar": {"data": "cifar10_jpeg_20k", "model": "mobilenet_v2_0.35_imagenet", "learning_rate": 3e-4},
}


@dataclass
class Arguments:
    """What is trained, how long, and how often."""

    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    data: str = field(default=os.environ.get("HF_IMPORTANCE_DATA", "data"), metadata={"help": "Folder of the tasks."})
    models: str | None = field(
        default=os.environ.get("HF_IMPORTANCE_MODELS"), metadata={"help": "Folder of the models."}
    )
    compare: str = field(default="time", metadata={"help": "At equal 'time', or at equal 'steps'."})
    steps: int = field(default=1000, metadata={"help": "Steps of the plain Trainer."})
    learning_rate: float | None = field(default=None, metadata={"help": "By default the task's."})
    batch_size: int = field(default=32, metadata={"help": "Examples a step, b."})
    examples: int | None = field(default=None, metadata={"help": "Training examples, at most."})
    side: int = field(default=96, metadata={"help": "Images are scaled to squares of this many pixels."})
    seeds: int = field(default=3, metadata={"help": "Runs of each row."})
    rows: list[str] = field(default_factory=lambda: list(ROWS)[:5], metadata={"help": f"Of {list(ROWS)}."})
    results: str | None = field(default=None, metadata={"help": "File that gets one line of JSON a run."})


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


class Images(torch.utils.data.Dataset):
    """Images in [-1, 1], decoded once; half of them mirrored at random where they are trained on."""

    def __init__(self, rows: datasets.Dataset, side: int, flip: bool) -> None:
        pictures = (np.asarray(row["image"].convert("RGB").resize((side, side))) for row in rows)
        self.pixels = torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).contiguous()
        self.labels, self.flip = rows["label"], flip

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        """Give one image."""
        image = self.pixels[index].float() / 127.5 - 1
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return {"pixel_values": image, "labels": int(self.labels[index])}


@dataclass
class Task:
    """What every row of the table is trained and tested on."""

    new_model: Callable[[], torch.nn.Module]
    train: object
    train_for_loss: object
    test: object
    collate: Callable


def load(arguments: Arguments) -> Task:
    """Load a task, ready to train on."""
    task, data = TASKS[arguments.task], Path(arguments.data)
    folder = data / task["data"]
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}. Say where the data is with --data or HF_IMPORTANCE_DATA.")
    model = (Path(arguments.models) if arguments.models else data.parent / "models") / task["model"]
    rows = {split: datasets.Dataset.from_parquet(str(folder / f"{split}.parquet")) for split in ("train", "test")}
    label = rows["train"].features["label"]
    rows["train"] = rows["train"].select(range(min(arguments.examples or len(rows["train"]), len(rows["train"]))))
    options = {"num_labels": label.num_classes, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    if "image" in rows["train"].features:
        return Task(
            lambda: AutoModelForImageClassification.from_pretrained(model, **options),
            Images(rows["train"], arguments.side, flip=True),
            Images(rows["train"].select(range(min(1000, len(rows["train"])))), arguments.side, flip=False),
            Images(rows["test"], arguments.side, flip=False),
            default_data_collator,
        )
    tokenizer = AutoTokenizer.from_pretrained(model)

    def texts(part: datasets.Dataset) -> list[dict]:
        tokens = tokenizer(list(part["text"]), truncation=True, max_length=64, return_token_type_ids=False)
        names = ("input_ids", "attention_mask")
        return [{n: tokens[n][i] for n in names} | {"labels": label} for i, label in enumerate(part["label"])]

    train = texts(rows["train"])
    return Task(
        lambda: AutoModelForSequenceClassification.from_pretrained(model, **options),
        train,
        train[:1000],
        texts(rows["test"]),
        DataCollatorWithPadding(tokenizer),
    )


def run(name: str, arguments: Arguments, task: Task, seed: int, steps: int, seconds: float | None) -> dict:
    """Train one row once, and give its figures."""
    transformers.set_seed(seed)
    learning_rate = arguments.learning_rate or TASKS[arguments.task]["learning_rate"]
    args = ImportanceTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=128,
        max_steps=steps if seconds is None else 50 * steps,
        learning_rate=learning_rate,
        lr_scheduler_type="linear" if seconds is None else "constant",
        warmup_steps=0.05 if seconds is None else 0,
        seed=seed,
        batch_norm="frozen",
        logging_steps=20,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **ROWS[name],
    )
    clock = Clock(learning_rate, seconds)
    trainer = ImportanceTrainer(
        task.new_model(), args, data_collator=task.collate, train_dataset=task.train, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    last, done = entries[-1], trainer.state.global_step
    trainer.compute_metrics = lambda found: {"error": float((found.predictions.argmax(-1) != found.label_ids).mean())}
    on_train, on_test = trainer.evaluate(task.train_for_loss), trainer.evaluate(task.test)
    return {
        "train loss": on_train["eval_loss"],
        "test loss": on_test["eval_loss"],
        "test error": on_test["eval_error"],
        "steps": done,
        "seconds": clock.spent,
        "trained": last.get("importance/examples_trained", done * arguments.batch_size),
        "scored": last.get("importance/examples_scored", 0),
        "on": statistics.mean(entry.get("importance/active_share", 0.0) for entry in entries),
        "tau": last.get("importance/tau", 1.0),
        "kappa": last.get("importance/kappa", float("nan")),
    }


def main() -> None:
    """Run all rows, seeds interleaved, and print mean and standard error of each figure."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task, seconds = load(arguments), None
    if arguments.compare == "time":
        pilot = run("plain", arguments, task, seed=0, steps=min(arguments.steps, 30), seconds=None)
        seconds = pilot["seconds"] / pilot["steps"] * arguments.steps
        print(f"Every run trains for {seconds:.0f} s, what {arguments.steps} plain steps take.", flush=True)
    results: dict[str, list[dict]] = {name: [] for name in arguments.rows}
    for seed in range(arguments.seeds):
        for name in arguments.rows:
            found = run(name, arguments, task, seed, arguments.steps, seconds)
            results[name].append(found)
            print(seed, name, {key: round(value, 4) for key, value in found.items()}, flush=True)
            if arguments.results:
                with open(arguments.results, "a") as file:
                    file.write(json.dumps({"row": name, "seed": seed, **vars(arguments), **found}) + "\n")
    names = list(next(iter(results.values()))[0])
    print(f"\n{arguments}\ntorch {torch.__version__}, transformers {transformers.__version__}")
    print("\n| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row, runs in results.items():
        cells = []
        for name in names:
            values = [figures[name] for figures in runs]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} ± {error:.2g}")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
