"""What the four task scripts share: data arguments, loading from the Hub or from files, metrics, the last lines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import is_offline_mode
from transformers import HfArgumentParser, set_seed

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments

DEFAULTS = {
    "logging_steps": 0.02,  # of the run: 50 points, however long it is
    "warmup_steps": 0.05,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


@dataclass
class Task:
    """What is fine-tuned on what."""

    model: str = field(metadata={"help": "Hub id or folder."})
    dataset: str = field(metadata={"help": "Hub id, or a folder with train.parquet (.json, .csv, .txt) and others."})
    dataset_config: str | None = field(default=None, metadata={"help": "Such as sst2, of --dataset nyu-mll/glue."})
    eval_split: str = field(default="validation", metadata={"help": "Split that is evaluated."})
    max_train_examples: int | None = field(default=None, metadata={"help": "The first so many rows."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "The same, of the evaluated split."})
    metric: str | None = field(default=None, metadata={"help": "Of evaluate: Hub id, or the folder of its script."})


def parse(script_doc: str, **defaults) -> tuple[Task, ImportanceTrainingArguments]:
    """Read both sets of arguments from the command line, and seed what comes next: the new head."""
    parser = HfArgumentParser(
        [Task, ImportanceTrainingArguments],
        description=script_doc.split("\n")[0],
        # An error would otherwise stand behind a hundred lines of arguments.
        usage="%(prog)s --model MODEL --dataset DATASET --output_dir OUT [any other; --help lists them]",
    )
    parser.set_defaults(**DEFAULTS | defaults)
    task, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    return task, args


def load_splits(task: Task) -> tuple[Dataset, Dataset]:
    """Give the training and the evaluated split.

    Raises:
        ValueError: The data has no split of that name.
    """
    files = {file.stem: str(file) for file in Path(task.dataset).glob("*") if file.suffix in LOADERS}
    if files:
        suffixes = {Path(file).suffix for file in files.values()}
        data = load_dataset(LOADERS[suffixes.pop()], data_files=files)
    else:
        data = load_dataset(task.dataset, task.dataset_config)
    for split in ("train", task.eval_split):
        if split not in data:
            raise ValueError(f"--dataset {task.dataset} has no split {split!r}, only {', '.join(data)}: --eval_split.")

    def first(split: Dataset, size: int | None) -> Dataset:
        return split if size is None else split.select(range(min(size, len(split))))

    return first(data["train"], task.max_train_examples), first(data[task.eval_split], task.max_eval_examples)


def load_metric(task: Task, default: str, offline: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Give a function of ``predictions`` and ``references``.

    It is ``evaluate``'s metric of that name. Its scripts live on the Hub: offline (``HF_HUB_OFFLINE=1``) it is the
    ``offline`` function, unless ``--metric`` names a folder that holds such a script.
    """
    if is_offline_mode() and (task.metric is None or not Path(task.metric).exists()):
        return offline
    return evaluate.load(task.metric or default).compute


def train_and_save(trainer: ImportanceTrainer) -> dict[str, float]:
    """Train, evaluate, print, and leave model, metrics (``all_results.json``), log and card in the output folder.

    Returns:
        What the evaluation found.
    """
    trainer.log_metrics("train", train := trainer.train().metrics)
    trainer.save_metrics("train", train)
    trainer.log_metrics("eval", evaluation := trainer.evaluate())
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card()
    return evaluation
