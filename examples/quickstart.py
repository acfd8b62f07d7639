"""Does importance sampling pay? On any machine: no GPU, no download, no data beside the repository.

A tiny ViT is first trained on scikit-learn's handwritten digits 0 to 4, then fine-tuned on all ten from the same
weights: by plain ``Trainer``; by ``ImportanceTrainer``, with the same arguments; and by plain ``Trainer`` with as many
steps, and with the batch, that cost what importance sampling did. Three seeds, one process::

    python examples/quickstart.py
    python examples/quickstart.py --model bert-base-uncased --dataset rotten_tomatoes
    python examples/quickstart.py --model path/to/model --dataset path/to/folder_with_train_and_test_parquet

Measured on 2 busy CPU cores, of which it uses one (torch 2.13.0, transformers 5.23.0), 49 s of processor time in all::

                steps  batch_size  compute  seconds            loss             error
    plain         500          32     1.00      9.0  0.2077 ± 0.022  0.06034 ± 0.0025
    importance    500          32     0.79     15.8  0.2029 ± 0.028   0.0596 ± 0.0058
    short         394          32     0.79      7.3  0.1982 ± 0.023  0.06034 ± 0.0046
    small         500        25.3     0.79      8.4  0.2032 ± 0.024  0.06402 ± 0.0066

A fifth less compute at the same test error, which fewer plain steps give too: no difference, says its last sentence.
In seconds it loses, for the steps of a model this small are mostly overhead.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import transformers
from datasets import ClassLabel, Image, Value, load_dataset
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import HfArgumentParser, ProgressCallback, Trainer, ViTConfig, ViTForImageClassification, set_seed

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.compare import COLORS, SIDES, Comparison, compare
from hf_importance.reporting.report import relative_compute

DEFAULTS = {
    "output_dir": "runs/quickstart",
    "report_to": "tensorboard",
    "logging_steps": 0.04,  # of the run: 25 points in the figure, however long it is
    "warmup_steps": 0.05,
    "save_strategy": "no",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "importance_log": "all",  # the figure needs what was scored
}
# A forward pass is a third of the arithmetic of a training step. It is said, not measured, so that every machine
# prints the same; in seconds a model this small gains nothing, for its steps are mostly overhead.
DIGITS_DEFAULTS = DEFAULTS | {
    "max_steps": 500,
    "learning_rate": 3e-3,
    "importance_kwargs": {"kappa": 1 / 3},
}
LABELS = {
    "plain": "Trainer",
    "importance": "ImportanceTrainer",
    "short": "Trainer, as much compute: fewer steps",
    "small": "Trainer, as much compute: smaller batches",
}


@dataclass
class Task:
    """What is fine-tuned on what."""

    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder; by default a tiny ViT, trained here."}
    )
    dataset: str | None = field(default=None, metadata={"help": "Hub id or folder; by default scikit-learn's digits."})
    dataset_config: str | None = field(default=None, metadata={"help": "Such as sst2, of --dataset nyu-mll/glue."})
    pretraining_steps: int = field(default=100, metadata={"help": "Of the tiny ViT, on the digits 0 to 4."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Every side is run with each."})

    def __post_init__(self) -> None:
        """Refuse one without the other: the tiny ViT reads nothing but 8x8 digits, and no other model does."""
        if (self.model is None) != (self.dataset is None):
            raise ValueError(f"Give both or neither: --model is {self.model}, --dataset is {self.dataset}.")


def quiet(trainer: Trainer) -> Trainer:
    """Keep the progress bar, without a dictionary at every log."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            callback.on_log = lambda *args, **kwargs: None
    return trainer


def load_own_task(task: Task, args: ImportanceTrainingArguments):
    """Give the digits, 8x8 grey pixels in [-1, 1], and the folder of a tiny ViT trained on 0 to 4 by plain Trainer."""
    torch.set_num_threads(1)  # a second one gains little on a model this small, and loses much on a busy machine
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    examples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
    train, test = train_test_split(examples, train_size=1344, random_state=0, stratify=labels)  # 42 full batches
    set_seed(args.seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=5, **sizes))
    args = replace(args, max_steps=task.pretraining_steps, report_to="none")
    quiet(Trainer(model, args, train_dataset=[example for example in train if example["labels"] < 5])).train()
    model.save_pretrained(f"{args.output_dir}/pretrained")
    return f"{args.output_dir}/pretrained", train, test, 10, None, transformers.AutoModelForImageClassification


def load_task(task: Task, args: ImportanceTrainingArguments):
    """Load a dataset of images or of text, for classification, and what prepares it for the model."""
    files = {file.stem: str(file) for file in sorted(Path(task.dataset).glob("*.parquet"))}
    data = load_dataset("parquet", data_files=files) if files else load_dataset(task.dataset, task.dataset_config)
    columns = data["train"].features
    label = next(name for name, feature in columns.items() if isinstance(feature, ClassLabel))
    image = next((name for name, feature in columns.items() if isinstance(feature, Image)), None)
    texts = [name for name, feature in columns.items() if feature == Value("string")][:2]  # one, or a pair
    data = data.rename_column(label, "labels")
    # The test labels of some benchmarks are hidden: -1.
    test = next(name for name in ("test", "validation") if name in data and min(data[name]["labels"]) >= 0)
    if image:
        processor = transformers.AutoImageProcessor.from_pretrained(task.model)
        model_class = transformers.AutoModelForImageClassification
        args.remove_unused_columns = False  # the model does not know the column that the pixels are made of

        def to_pixels(rows: dict) -> dict:
            pictures = [picture.convert("RGB") for picture in rows[image]]
            return {**processor(pictures, return_tensors="pt"), "labels": rows["labels"]}

        data = data.with_transform(to_pixels)
    else:
        processor = transformers.AutoTokenizer.from_pretrained(task.model)
        model_class = transformers.AutoModelForSequenceClassification
        data = data.map(lambda rows: processor(*(rows[text] for text in texts), truncation=True), batched=True)
    return task.model, data["train"], data[test], columns[label].num_classes, processor, model_class


def course(log: list[dict], full: float) -> tuple[list[float], list[float]]:
    """Give the compute at which a run logged, and its training loss; ``full``: what a step of a plain run costs."""
    points = [entry for entry in log if "loss" in entry]
    costs = [relative_compute(entry) if "importance/tau" in entry else full for entry in points]
    steps = [entry["step"] * cost for entry, cost in zip(points, costs, strict=True)]
    return steps, [entry["loss"] for entry in points]


def draw(found: Comparison, logs: dict[tuple[str, int], list[dict]], path: Path) -> None:
    """Draw loss and metric of all sides against compute: the mean over the seeds, and each of them."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    plain = fmean(found.of("plain", lambda row: row.batch_size))
    same = not any(found.of("importance", lambda row: row.steps_on))
    for side in SIDES[:1] if same else SIDES:
        color, runs = COLORS[side], [log for (name, _), log in sorted(logs.items()) if name == side]
        sizes = found.of(side, lambda row: row.batch_size / plain)
        lines = [course(log, size) for log, size in zip(runs, sizes, strict=False)]
        for steps, losses in lines:
            left.plot(steps, losses, color=color, alpha=0.2, linewidth=1)
        together = [[fmean(values) for values in zip(*some, strict=False)] for some in zip(*lines, strict=True)]
        label = "all sides: importance sampling stayed off" if same else LABELS[side]
        if together:  # none where a side is the plain one
            left.plot(*together, color=color, linewidth=2, label=label)
        compute, metric = found.of(side, lambda row: row.compute), found.of(side)
        right.plot(compute, metric, "o", color=color, alpha=0.4, markeredgewidth=0)
        right.plot(fmean(compute), fmean(metric), "D", color=color, markersize=9, markeredgecolor="white")
    left.set(yscale="log", xlabel="compute (steps of plain training)", ylabel="training loss")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="compute (plain training: 1)", ylabel=found.metric.removeprefix("eval_").replace("_", " "))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    left.legend(frameon=False, fontsize=9)
    right.set_title("diamonds: means over the seeds", loc="left", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all sides, print the table and what it comes to, and say where the rest is."""
    own_task = HfArgumentParser(Task, add_help=False).parse_known_args()[0].model is None
    parser = HfArgumentParser([Task, ImportanceTrainingArguments], description=__doc__.split("\n")[0])
    parser.set_defaults(**DIGITS_DEFAULTS if own_task else DEFAULTS)
    task, args = parser.parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()  # that the new head is untrained is what fine-tuning means
    transformers.logging.disable_progress_bar()  # of loading weights; not the Trainer's
    weights, train, test, labels, processor, model_class = (load_own_task if own_task else load_task)(task, args)
    logs = {}

    def fine_tune(seed: int, output_dir: str, importance_sampling: bool, **changes) -> Trainer:
        set_seed(seed)  # the new head starts the same on every side
        model = model_class.from_pretrained(
            weights, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        name = Path(output_dir).name
        trainer = (ImportanceTrainer if importance_sampling else Trainer)(
            model=model,
            args=replace(args, seed=seed, output_dir=output_dir, run_name=name, **changes),
            train_dataset=train,
            eval_dataset=test,
            processing_class=processor,
            compute_metrics=lambda found: {"error": float((found.predictions.argmax(-1) != found.label_ids).mean())},
        )
        quiet(trainer).train()
        trainer.evaluate()
        logs[name.split("-")[0], seed] = trainer.state.log_history
        return trainer

    found = compare(fine_tune, task.seeds, output_dir=args.output_dir)
    print(f"\n{found}")
    found.write(Path(args.output_dir))
    figure = Path(args.output_dir, "quickstart.png")
    draw(found, logs, figure)
    print(f"\nFigure: {figure}\nLogs:   tensorboard --logdir {args.output_dir}")


if __name__ == "__main__":
    main()
