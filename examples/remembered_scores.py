r"""Remembered scores against plain training on real tasks: equal steps, several seeds, test set looked at once.

Every seed trains the same model once a side, in one process, which side first taking turns: plainly; by history with
``importance_budget="variance"`` (as many examples as plain training: equal compute, less noise) and with
``"constant_variance"`` (equal steps, fewer examples). Everything else is equal. Pools and ``"auto"`` on the same tasks
are in ``presampling_equal_time.py``::

    python examples/remembered_scores.py --data path/to/data --models path/to/models --tasks fashion --seeds 0 1 2
    python examples/remembered_scores.py --report runs/remembered_scores.csv

The first appends a line a run to the CSV file, the second prints its table and draws the figure. Results stand in
docs/history.md.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    MobileNetV2ForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    default_data_collator,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting import palette
from hf_importance.reporting.markdown import table
from hf_importance.reporting.report import relative_compute
from hf_importance.reporting.spread import mean_and_spread

SIDES = {
    "plain": {"importance_sampling": False},
    "variance": {"importance_method": "history"},
    "constant_variance": {"importance_method": "history", "importance_budget": "constant_variance"},
}
LABELS = {
    "plain": "plain",
    "variance": "history, equal compute",
    "constant_variance": "history, equal noise",
}
COLORS = {"plain": palette.PLAIN, "variance": palette.GREEN, "constant_variance": palette.OURS}


class Rows(torch.utils.data.Dataset):
    """Columns of equal length, in memory."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give one row."""
        return {name: column[index] for name, column in self.columns.items()}


@dataclass
class Task:
    """What is trained, on what, and how.

    Attributes:
        model: Makes a new model for a seed that is set already.
        train: Training examples.
        test: Examples that are looked at once, behind training.
        validation: Loads those that a choice may be made by.
        arguments: Of the trainer; the same for every side.
        collator: Makes a batch.
    """

    model: Callable[[], nn.Module]
    train: Rows
    test: Rows
    validation: Callable[[], Rows]
    arguments: dict[str, Any]
    collator: Any = field(default=default_data_collator)


class SmallCNNForImageClassification(PreTrainedModel):
    """Two convolutions and two linear layers for small pictures in one colour."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.body = nn.Sequential(
            *(
                nn.Conv2d(1, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
            ),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU()),
        )
        self.classifier = nn.Linear(64, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what torch has drawn."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classify."""
        logits = self.classifier(self.body(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def pictures(
    folder: Path, split: str, count: int | None, side: int, mean: float = 0.5, scale: float = 0.5, start: int = 0
) -> Rows:
    """Load pictures of one size as float tensors."""
    files = {split: [str(f) for f in sorted(folder.glob(f"*{split}*.parquet"))]}
    data = load_dataset("parquet", data_files=files, split=split)
    data = data.select(range(start, len(data) if count is None else min(start + count, len(data))))
    image = next(name for name in data.column_names if "image" in name or name == "img")
    label = next(name for name in data.column_names if "label" in name and "text" not in name)
    arrays = []
    for row in data:
        picture = row[image]
        if side != picture.size[0] or side != picture.size[1]:
            picture = picture.convert("RGB").resize((side, side))
        array = np.asarray(picture, dtype=np.float32) / 255
        arrays.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    pixels = (torch.tensor(np.stack(arrays)) - mean) / scale
    return Rows(pixel_values=pixels, labels=torch.tensor(data[label]))


def texts(folder: Path, split: str, count: int | None, tokenizer: Any, length: int = 48) -> Rows:
    """Load classified texts as tokens."""
    files = {split: [str(f) for f in sorted(folder.glob(f"*{split}*.parquet")) if "imbalanced" not in f.name]}
    data = load_dataset("parquet", data_files=files, split=split)
    data = data if count is None else data.select(range(min(count, len(data))))
    text = next(name for name in ("text", "sentence", "utterance") if name in data.column_names)
    label = next(name for name in ("label", "intent", "labels") if name in data.column_names)
    found = tokenizer(data[text][:], truncation=True, max_length=length)
    return Rows(input_ids=found["input_ids"], attention_mask=found["attention_mask"], labels=data[label][:])


def fashion(data: Path, models: Path) -> Task:
    """Train a small CNN from scratch on 10,000 pictures of Fashion-MNIST."""
    return Task(
        lambda: SmallCNNForImageClassification(PretrainedConfig(num_labels=10)),
        pictures(data / "fashion_mnist", "train", 10_000, 28),
        pictures(data / "fashion_mnist", "test", None, 28),
        lambda: pictures(data / "fashion_mnist", "train", 10_000, 28, start=10_000),
        {"per_device_train_batch_size": 64, "num_train_epochs": 8, "learning_rate": 0.05, "optim": "sgd",
         "optim_args": "momentum=0.9"},
    )  # fmt: skip


def clothing(data: Path, models: Path, count: int | None = None) -> Task:
    """Fine-tune MobileNetV2 on 3,068 photographs of clothes at 96 pixels."""

    def model() -> nn.Module:
        found = MobileNetV2ForImageClassification.from_pretrained(
            models / "mobilenet_v2_0.35_imagenet", num_labels=10, ignore_mismatched_sizes=True
        )
        for layer in found.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # torch's own; transformers' has 0.997, statistics of the last batch alone
        return found.to(memory_format=torch.channels_last)  # 0.6 of the time on a CPU, for plain training too

    folder = data / "clothing10_128px"
    return Task(
        model,
        pictures(folder, "train", count, 96),
        pictures(folder, "test", None, 96),
        lambda: pictures(folder, "validation", None, 96),
        {"per_device_train_batch_size": 32, "num_train_epochs": 8, "learning_rate": 1e-3},
    )


def cifar(data: Path, models: Path, count: int | None = 2_000) -> Task:
    """Fine-tune ResNet-20, trained on CIFAR-10, on 2,000 of its pictures re-encoded as JPEG."""

    def model() -> nn.Module:
        found = AutoModelForImageClassification.from_pretrained(models / "cifar_resnet20", trust_remote_code=True)
        return found.to(memory_format=torch.channels_last)

    folder = data / "cifar10_jpeg_20k"
    return Task(
        model,
        pictures(folder, "train", count, 32, 0.47, 0.25),
        pictures(folder, "test", None, 32, 0.47, 0.25),
        lambda: pictures(folder, "train", 5_000, 32, 0.47, 0.25, start=2_000),
        {"per_device_train_batch_size": 64, "num_train_epochs": 5, "learning_rate": 0.01, "optim": "sgd",
         "optim_args": "momentum=0.9"},
    )  # fmt: skip


def _minilm(models: Path, data: Path, count: int | None, labels: int, epochs: int) -> Task:
    folder = models / "minilm-l6-h384-fp16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Task(
        lambda: AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype=torch.float32),
        texts(data, "train", count, tokenizer),
        texts(data, "test", None, tokenizer),
        lambda: texts(data, "validation", None, tokenizer),
        {"per_device_train_batch_size": 32, "num_train_epochs": epochs, "learning_rate": 1e-4},
        DataCollatorWithPadding(tokenizer),
    )


def sst2(data: Path, models: Path, count: int | None = 1_500) -> Task:
    """Fine-tune MiniLM on 1,500 sentences of film reviews, two classes."""
    return _minilm(models, data / "sst2_sentences", count, 2, 6)


def clinc(data: Path, models: Path) -> Task:
    """Fine-tune MiniLM on 1,500 requests, 150 classes."""
    return _minilm(models, data / "clinc150", 1_500, 150, 4)


def shakespeare(data: Path, models: Path) -> Task:
    """Train a Llama of 260,000 parameters on 1,024 pieces of Shakespeare of 128 tokens."""
    folder = models / "llama_stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def blocks(name: str, count: int, start: int = 0) -> Rows:
        text = (data / "tinyshakespeare" / name).read_text()[start * 500 : (start + count) * 500]
        tokens = tokenizer(text)["input_ids"]
        rows = torch.tensor(tokens[: count * 128]).view(count, 128)
        return Rows(input_ids=rows, labels=rows)

    return Task(
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        blocks("train.txt", 1_024),
        blocks("validation.txt", 256),
        lambda: blocks("train.txt", 256, start=1_024),
        {"per_device_train_batch_size": 16, "num_train_epochs": 5, "learning_rate": 1e-3},
    )


TASKS = {f.__name__: f for f in (fashion, clothing, cifar, sst2, clinc, shakespeare)}


def error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Give the share of wrong predictions; of next tokens where there is one a position."""
    if logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float((logits.argmax(-1) != labels).mean())


def run(task: Task, side: str, seed: int, folder: Path, epochs: float | None) -> dict[str, Any]:
    """Train and measure once."""
    torch.manual_seed(seed)
    settings = {"save_strategy": "no", "report_to": "none", "logging_steps": 50, "use_cpu": True, "disable_tqdm": True,
                "importance_log": "all", "per_device_eval_batch_size": 128, "dataloader_pin_memory": False,
                }  # fmt: skip
    changed = {} if epochs is None else {"num_train_epochs": epochs}
    args = ImportanceTrainingArguments(
        str(folder), seed=seed, **settings, **{**task.arguments, **changed}, **SIDES[side]
    )
    trainer = ImportanceTrainer(
        model=task.model(), args=args, train_dataset=task.train, data_collator=task.collator,
        compute_metrics=lambda found: {"error": error(found.predictions, found.label_ids)},
    )  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    on_train = trainer.evaluate(task.train)
    on_test = trainer.evaluate(task.test)
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        last |= entry
    taus = [e["importance/tau"] for e in trainer.state.log_history if "importance/tau" in e]
    return {
        "side": side,
        "seed": seed,
        "steps": trainer.state.global_step,
        "training loss": on_train["eval_loss"],
        "test loss": on_test["eval_loss"],
        "test error": on_test["eval_error"],
        "compute": relative_compute(last) if taus else 1.0,
        "seconds": seconds,
        "cpu seconds": cpu,
        "gain": last.get("importance/gain", 1.0),
        "kappa": last.get("importance/kappa", float("nan")),
        "largest tau": max(taus, default=float("nan")),
        "share of steps on": sum(e.get("importance/active_share", 0) for e in trainer.state.log_history)
        / max(len(taus), 1),
    }


def report(file: Path, figure: Path) -> None:
    """Print the table of a CSV file, and draw what each side saved and cost."""
    with open(file) as opened:
        rows = [
            {k: v if k in ("task", "side") else float(v) for k, v in row.items()} for row in csv.DictReader(opened)
        ]
    columns = ("training loss", "test loss", "test error", "compute", "cpu seconds", "gain", "largest tau")
    lines = []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for task in tasks:
        for side in SIDES:
            found = [row for row in rows if row["task"] == task and row["side"] == side]
            if not found:
                continue
            cells = (mean_and_spread([row[name] for row in found]) for name in columns)
            lines.append([task, side, len(found), *cells])
    print(table(["task", "side", "seeds", *columns], lines, text=2))
    _draw(rows, tasks, figure)


def _stayed_off(rows: list[dict], task: str) -> bool:
    return not any(row["share of steps on"] for row in rows if row["task"] == task)


def _draw(rows: list[dict], tasks: list[str], file: Path) -> None:
    picture = Figure(figsize=(9, 1.2 + 0.75 * len(tasks)), layout="constrained")
    shown = ("compute", "training loss", "test error")
    for axes, name in zip(picture.subplots(1, len(shown)), shown, strict=True):
        for place, task in enumerate(tasks):
            plain = np.mean([r[name] for r in rows if r["task"] == task and r["side"] == "plain"])
            for offset, side in zip((-0.2, 0, 0.2), SIDES, strict=True):
                values = [r[name] / plain for r in rows if r["task"] == task and r["side"] == side]
                if _stayed_off(rows, task):  # one run three times: a dot would look like a result
                    continue
                axes.plot(values, [place + offset] * len(values), "o", color=COLORS[side], markersize=5, alpha=0.8)
            if _stayed_off(rows, task):
                middle = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
                axes.text(0.5, place, "identical: stayed off", color="0.4", fontsize=8, **middle)
        axes.axvline(1, color="0.8", linewidth=1, zorder=0)
        axes.set(xlabel=f"{name} / plain", yticks=range(len(tasks)), ylim=(-0.5, len(tasks) - 0.5))
        if name == "training loss":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticklabels(tasks if axes is picture.axes[0] else [])
        axes.invert_yaxis()
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right", "left"]].set_visible(False)
    for side, color in COLORS.items():
        picture.axes[0].plot([], [], "o", color=color, label=LABELS[side])
    picture.suptitle("Over the mean of plain training on the same task, a dot a seed", x=0.01, ha="left")
    picture.legend(loc="outside lower center", ncols=3, frameon=False)
    picture.savefig(file, dpi=150)


def main() -> None:
    """Run the tasks asked for, or report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="In place of each task's own.")
    parser.add_argument("--output", type=Path, default=Path("runs/remembered_scores.csv"))
    parser.add_argument("--report", type=Path)
    settings = parser.parse_args()
    if settings.report:
        report(settings.report, settings.report.with_suffix(".png"))
        return
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    for name in settings.tasks:
        task = TASKS[name](settings.data, settings.models)
        for seed in settings.seeds:
            sides = list(settings.sides)
            turn = seed % len(sides)
            for side in sides[turn:] + sides[:turn]:
                row = {"task": name, **run(task, side, seed, settings.output.parent / "trainer", settings.epochs)}
                print(row, flush=True)
                new = not settings.output.exists()
                with open(settings.output, "a", newline="") as opened:
                    writer = csv.DictWriter(opened, row)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
