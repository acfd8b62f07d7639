"""The sides of the bench, and one run of one of them."""

from __future__ import annotations

import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from data import Examples, Splits
from learners import TASKS, Task
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import hf_importance
from hf_importance import ImportanceTrainer, ImportanceTrainingArguments, Sampler
from hf_importance.samplers.published import InfoBatch

PACKAGE = Path(hf_importance.__file__).parent


@dataclass(frozen=True)
class Side:
    """A way to train.

    Attributes:
        settings: Arguments of importance sampling; None: the plain Trainer.
        sampler: Makes one, which takes the place of the arguments.
        scores: Whether examples are scored, so that κ matters.
        remembers: Whether it is plain training where no example is seen twice.
        tuned_as: The side whose learning rate it has; None: its own.
    """

    settings: dict[str, Any] | None = None
    sampler: Callable[[], Sampler] | None = None
    scores: bool = True
    remembers: bool = False
    tuned_as: str | None = None


PRESAMPLE = {"importance_method": "presample"}
HISTORY = {"importance_method": "history", "importance_budget": "constant_variance"}
AUTO = {"importance_method": "auto"}


def _biased(k: float, **settings: Any) -> dict[str, Any]:
    return {"importance_kwargs": {"bias": k, "normalise": True}, **(settings or PRESAMPLE)}


SIDES = {
    "plain": Side(scores=False),
    # As many plain steps as presampling cost, and plain steps of a batch as small as it cost.
    "short": Side(scores=False, tuned_as="plain"),
    "small": Side(scores=False, tuned_as="plain"),
    "presample": Side(PRESAMPLE),
    # Weights to the power k, over their mean in the step.
    "normalised": Side(_biased(1.0)),
    "k=1/2": Side(_biased(0.5)),
    "k=1/2 until 0.7": Side(
        {**PRESAMPLE, "importance_kwargs": {"bias": 0.5, "bias_until": 0.7, "normalise": True}}, tuned_as="k=1/2"
    ),
    "k=0": Side(_biased(0.0), tuned_as="k=1/2"),
    "k=1/2, authors": Side({**PRESAMPLE, "importance_kwargs": {"bias": 0.5}}, tuned_as="k=1/2"),
    "k=0, authors": Side({**PRESAMPLE, "importance_kwargs": {"bias": 0.0}}, tuned_as="k=1/2"),
    "constant time": Side({**PRESAMPLE, "importance_budget": "constant_time"}),
    "margin 1": Side({**PRESAMPLE, "importance_kwargs": {"margin": 1.0}}, tuned_as="presample"),
    "history": Side(HISTORY, scores=False, remembers=True),
    "history, k=1/2": Side(_biased(0.5, **HISTORY), scores=False, remembers=True, tuned_as="history"),
    "auto": Side(AUTO),
    "auto, k=1/2": Side(_biased(0.5, **AUTO), tuned_as="k=1/2"),
    "auto, k=0": Side(_biased(0.0, **AUTO), tuned_as="k=1/2"),
    "two phases": Side({"importance_method": "two_phase"}, tuned_as="auto"),
    "InfoBatch": Side({}, InfoBatch, scores=False, remembers=True),
}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: Of ``TASKS``.
        side: Of ``SIDES``.
        kappa: Given cost of scoring an example over training one; 0 where none is scored.
        budget: Optimizer steps, in those of the task's base run.
        rate: Peak learning rate; it falls linearly to 0.
        seed: Of the initial weights, the order of the data and the draws.
        of: The κ of the presampling run whose cost ``short`` and ``small`` have; 0 for others.
        batch: Examples of a step over the task's batch size, below 1 for ``small``.
    """

    task: str
    side: str
    kappa: float
    budget: float
    rate: float
    seed: int
    of: float = 0.0
    batch: float = 1.0


@lru_cache(maxsize=1)
def commit() -> str:
    """Give the last commit that touched the package."""
    command = ["git", "log", "-1", "--format=%h", "--", "."]
    return subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()


@lru_cache(maxsize=2)
def splits(task: str, folder: Path, models: Path, share: float) -> Splits:
    """Read a task's data, once for the runs that follow each other, and keep a share of what is trained on."""
    found = TASKS[task].load(folder, models)

    def some(part: Examples) -> Examples:
        return part.part(0, max(math.ceil(len(part) * share), 256))

    return replace(found, train=some(found.train), validation=some(found.validation), test=some(found.test))


def run(job: Job, folder: Path, models: Path, share: float = 1.0) -> dict[str, Any]:
    """Train, and report on the validation and the test part.

    Args:
        job: What.
        folder: Of the data.
        models: Of the tokenizer.
        share: Of the task's data; below 1 for a look at whether it runs.

    Returns:
        The job, and what came out: ``compute`` is trained and κ times scored examples over those of the base run.
    """
    task, side, parts = TASKS[job.task], SIDES[job.side], splits(job.task, folder, models, share)
    batch_size = max(round(task.batch_size * job.batch), 1)
    base = max(round(len(parts.train) / task.batch_size * task.epochs), 8)
    set_seed(job.seed)
    model = task.model(parts)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as output:
        common = _arguments(task, job, output, batch_size, max(round(base * job.budget), 4))
        trainer = _trainer(task, side, job, model, parts, common)
        metrics = trainer.train().metrics
    seconds = time.process_time() - started
    trained = trainer.args.max_steps * batch_size  # drop_last: every plain batch is whole
    scored = 0
    if side.settings is not None:
        trained, scored = (int(metrics[f"importance/examples_{name}"]) for name in ("trained", "scored"))
    found = {
        "compute": (trained + job.kappa * scored) / (base * task.batch_size),
        "steps": trainer.args.max_steps,
        "on": metrics.get("importance/steps_on", 0) / trainer.args.max_steps,
        "trained": trained,
        "scored": scored,
        "seconds": round(seconds, 2),
        "train_loss": round(metrics["train_loss"], 5),
    }
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        error, loss = evaluate(model, part, shifted=job.task == "characters")
        found |= {f"{name}_error": round(error, 6), f"{name}_loss": round(loss, 5)}
    versions = {"commit": commit(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {**asdict(job), **found, **versions}


def _arguments(task: Task, job: Job, output: str, batch_size: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": output,
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": job.rate,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0 if task.sgd else 1.0,
        "seed": job.seed,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def _trainer(task: Task, side: Side, job: Job, model: nn.Module, parts: Splits, common: dict[str, Any]) -> Trainer:
    given: dict[str, Any] = {"model": model, "train_dataset": parts.train, "data_collator": parts.train.collate}
    if task.sgd:
        given["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": job.rate, "momentum": 0.9})
    if side.settings is None:
        trainer = Trainer(args=TrainingArguments(**common), **given)
    elif side.sampler is not None:
        trainer = ImportanceTrainer(args=ImportanceTrainingArguments(**common), sampler=side.sampler(), **given)
    else:
        settings = {**side.settings}
        if side.scores:
            settings["importance_kwargs"] = {"kappa": job.kappa, **settings.get("importance_kwargs", {})}
        trainer = ImportanceTrainer(args=ImportanceTrainingArguments(**common, **settings), **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate(model: nn.Module, part: Examples, shifted: bool) -> tuple[float, float]:
    """Give the share of wrong predictions and the mean cross entropy; of next characters where ``shifted``."""
    model.eval()
    wrong, loss, count = 0, 0.0, 0
    with torch.no_grad():
        for batch in part.batches():
            logits, labels = model(**batch)["logits"], batch["labels"]
            if shifted:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            wrong += int((logits.argmax(-1) != labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    return wrong / count, loss / count
