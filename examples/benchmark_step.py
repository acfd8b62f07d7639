"""What a step costs: ImportanceTrainer while off against plain Trainer, and an importance step against its parts.

    python examples/benchmark_step.py                 # ViT, ResNet and BERT of a few million parameters
    python examples/benchmark_step.py --models bert --pairs 9

Both trainers run in one process, in turn (A B, B A, ...), on the same model and data; a row gives the median over the
pairs and their spread. The result, with hardware and versions, stands in docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.batches import Pool, batch_size_of
from hf_importance.presampling import draw, score_outputs, score_pool


@dataclass
class BenchmarkArguments:
    """What is measured, and how often."""

    models: list[str] = field(default_factory=lambda: ["vit", "resnet", "bert"], metadata={"help": "Of these three."})
    pairs: int = field(default=7, metadata={"help": "Runs of each trainer."})
    steps: int = field(default=12, metadata={"help": "Timed steps a run, after 3 that are not."})
    batch_size: int = field(default=32, metadata={"help": "Examples a step."})


def now() -> float:
    """Give the time in seconds: of the wall with an accelerator, else of the CPU, which no other program changes."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next: data, forward, backward, optimizer, all of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Keep the time, once the device is done."""
        self.ends.append(now())

    def median(self) -> float:
        """Give the median over the steps after the third."""
        return statistics.median(b - a for a, b in zip(self.ends[2:], self.ends[3:], strict=False))


def make_model(name: str) -> nn.Module:
    """Give a model from a config, 10 classes."""
    torch.manual_seed(0)
    if name == "vit":
        sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=10, **sizes))
    if name == "resnet":
        shape = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
        return ResNetForImageClassification(ResNetConfig(num_labels=10, **shape))
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    return BertForSequenceClassification(BertConfig(num_labels=10, **sizes))


def make_data(name: str, examples: int = 1024) -> Dataset:
    """Give random inputs of the model's shape: the time of a step does not depend on what they are."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, examples)
    if name == "bert":
        tokens = generator.integers(0, 30000, (examples, 64))
        columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    else:
        side = 32 if name == "vit" else 64
        columns = {"pixel_values": generator.random((examples, 3, side, side), dtype=np.float32), "labels": labels}
    return Dataset.from_dict(columns).with_format("torch")


def make_trainer(kind: type[Trainer], name: str, data: Dataset, settings: BenchmarkArguments) -> tuple:
    """Give a trainer whose switch stays off, and the callback that times its steps."""
    times = StepTimes()
    args = ImportanceTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.steps + 3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        tau_threshold=0.99 * settings.batch_size**0.5,
    )
    trainer = kind(model=make_model(name), args=args, train_dataset=data, callbacks=[times])
    return trainer, times


def overhead_while_off(name: str, data: Dataset, settings: BenchmarkArguments) -> tuple[float, list[float]]:
    """Give the plain Trainer's seconds a step, and the ratio of ours to it, pair by pair."""
    ratios, plain_seconds = [], []
    for pair in range(settings.pairs):
        seconds = {}
        for kind in (Trainer, ImportanceTrainer) if pair % 2 == 0 else (ImportanceTrainer, Trainer):
            trainer, times = make_trainer(kind, name, data, settings)
            trainer.log = lambda *_, **__: None  # prints nothing; the figures are not read here
            trainer.train()
            seconds[kind] = times.median()
        ratios.append(seconds[ImportanceTrainer] / seconds[Trainer])
        plain_seconds.append(seconds[Trainer])
    return statistics.median(plain_seconds), ratios


PARTS = ("own batch", "presample", "score", "resample", "train", "off")


def added_while_off(trainer: ImportanceTrainer, batch: dict) -> None:
    """Do all that a switched-off step does more than the plain Trainer's: score the logits, read the sums, average."""
    outputs = {"logits": torch.zeros(len(batch["labels"]), 10, device=batch["labels"].device)}
    score = score_outputs(outputs, batch, trainer._head, "upper_bound", None)
    trainer._pending.append((score, trainer._head.items(batch)))
    trainer._awaiting = True
    trainer._report.uniform_batch(batch_size_of(batch))
    trainer._report.step(False)
    trainer._settle()


def parts_of_a_step(name: str, data: Dataset, settings: BenchmarkArguments) -> dict[str, float]:
    """Give the median seconds of each part of an importance step, one after the other, and of what off adds."""
    trainer, _ = make_trainer(ImportanceTrainer, name, data, settings)
    loader = trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(settings.steps)
    own_batches = iter(loader)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(settings.steps + 1):
        marks = [now()]
        own = next(own_batches)
        marks.append(now())
        reserve = list(trainer._reserve_batches(own_batches))
        pool = Pool([trainer._prepare_inputs(batch) for batch in (own, *reserve)], trainer._padding())
        marks.append(now())
        scores = score_pool(trainer.model, pool, trainer._head, "upper_bound", None, None).cpu()
        marks.append(now())
        drawn = draw(pool, scores, torch.ones(len(reserve) + 1), "systematic", torch.Generator().manual_seed(step))
        marks.append(now())
        trainer.training_step(trainer.model, drawn.batch)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        marks.append(now())
        added_while_off(trainer, own)
        marks.append(now())
        if step:  # the first one warms up
            for part, before, after in zip(times, marks, marks[1:], strict=False):
                times[part].append(after - before)
    return {part: statistics.median(values) for part, values in times.items()}


def main() -> None:
    """Print one table for the switched-off trainer and one for the importance step."""
    (settings,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {settings.batch_size}")
    print(
        f"\n{'model':8} {'plain ms/step':>14} {'ours / plain, off':>18} {'min':>7} {'max':>7}  {settings.pairs} pairs"
    )
    for name in settings.models:
        plain, ratios = overhead_while_off(name, make_data(name), settings)
        print(
            f"{name:8} {1000 * plain:14.1f} {statistics.median(ratios):18.4f} {min(ratios):7.4f} {max(ratios):7.4f}",
            flush=True,
        )
    heads = (
        f"{'own batch':>10} {'presample':>10} {'score':>8} {'resample':>9} {'train':>8} {'off':>8} {'off/plain':>10}"
    )
    print(f"\n{'model':8} {heads}   (ms)")
    for name in settings.models:
        parts = parts_of_a_step(name, make_data(name), settings)
        row = " ".join(
            f"{1000 * parts[part]:{width}.1f}" for part, width in zip(parts, (10, 10, 8, 9, 8, 8), strict=True)
        )
        print(f"{name:8} {row} {parts['off'] / (parts['own batch'] + parts['train']):10.2%}", flush=True)


if __name__ == "__main__":
    main()
