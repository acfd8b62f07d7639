"""What importance sampling does to BatchNorm, and what each ``batch_norm`` policy does about it.

    python examples/batch_norm_policies.py --model path/to/mobilenet_v2 --dataset path/to/clothing10 --side 64

``--dataset`` is a folder with train.parquet and test.parquet (columns image and label), ``--model`` a Hub id or
folder. Every row starts from the same weights and takes the same steps; seeds are interleaved. ``drift`` says how far
the running means are from those of the uniform training data under the final weights, in standard deviations of each
channel, median over layers. The result stands in docs/batch_norm.md.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageClassification, HfArgumentParser, Trainer

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.batch_norm import Moments, batch_norm_layers

ROWS = {
    "plain Trainer": {"importance_sampling": False},
    "plain Trainer, frozen": {"importance_sampling": False, "batch_norm": "frozen"},
    "importance, untouched": {"batch_norm": "untouched"},
    "importance, batch": {"batch_norm": "batch"},
    "importance, running": {"batch_norm": "running"},
    "importance, weighted": {"batch_norm": "weighted"},
    "importance, frozen": {"batch_norm": "frozen"},
}


@dataclass
class Arguments:
    """What is trained, and how often."""

    model: str = field(metadata={"help": "Hub id or folder of an image classifier."})
    dataset: str = field(metadata={"help": "Folder with train.parquet and test.parquet."})
    from_scratch: bool = field(default=False, metadata={"help": "Take the model's config, not its weights."})
    side: int = field(default=64, metadata={"help": "Images are scaled to squares of this many pixels."})
    examples: int = field(default=4000, metadata={"help": "Training examples, at most."})
    steps: int = field(default=600, metadata={"help": "Optimizer steps of each run."})
    batch_size: int = field(default=16, metadata={"help": "Examples a step."})
    presample_ratio: float = field(default=5.0, metadata={"help": "Pool size over batch size."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, falling linearly to 0."})
    momentum: float = field(default=0.1, metadata={"help": "Of every BatchNorm layer, for all rows alike."})
    rows: list[str] = field(
        default_factory=lambda: list(ROWS), metadata={"help": "Of these, the plain Trainer first."}
    )
    seeds: int = field(default=3, metadata={"help": "Runs of each row."})


def load(file: Path, side: int, examples: int | None = None) -> datasets.Dataset:
    """Decode images once: ``pixel_values`` in [-1, 1] and ``labels``."""
    data = datasets.Dataset.from_parquet(str(file))
    data = data.select(range(min(examples or len(data), len(data))))
    pictures = (row["image"].convert("RGB").resize((side, side)) for row in data)
    pixels = (
        np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]).transpose(0, 3, 1, 2) / 127.5 - 1
    )
    return datasets.Dataset.from_dict({"pixel_values": pixels, "labels": data["label"]}).with_format("torch")


def new_model(arguments: Arguments, classes: int, seed: int) -> nn.Module:
    """Give the model, with the BatchNorm momentum that all rows share."""
    transformers.set_seed(seed)
    options = {"num_labels": classes, "trust_remote_code": True}
    if arguments.from_scratch:
        config = transformers.AutoConfig.from_pretrained(arguments.model, **options)
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            arguments.model, ignore_mismatched_sizes=True, **options
        )
    for layer in batch_norm_layers(model):
        layer.momentum = arguments.momentum
    return model


@torch.no_grad()
def drift(model: nn.Module, data: datasets.Dataset) -> float:
    """Give how far the running means are from the data's own, in channel standard deviations, median over layers."""
    layers, found = batch_norm_layers(model), {}

    def collect(layer: nn.Module, inputs: tuple) -> None:
        found[layer] = found[layer] + Moments.of(inputs[0]) if layer in found else Moments.of(inputs[0])

    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    for start in range(0, len(data), 250):
        model.eval()(pixel_values=data[start : start + 250]["pixel_values"])
    for hook in hooks:
        hook.remove()
    distances = []
    for layer, moments in found.items():
        mean = moments.total / moments.count
        deviation = (moments.squares / moments.count - mean.square()).clamp(min=1e-8).sqrt()
        distances.append(float(((layer.running_mean - mean) / deviation).square().mean().sqrt()))
    return statistics.median(distances)


def run(name: str, arguments: Arguments, train, test, seed: int) -> dict[str, float]:
    """Train one row once and give its figures."""
    args = ImportanceTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=250,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=seed,
        presample_ratio=arguments.presample_ratio,
        tau_threshold=1.05,  # on nearly all the time: what BatchNorm does to it is the question here
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=arguments.steps,
        dataloader_pin_memory=False,
        **ROWS[name],
    )
    kind = Trainer if name == "plain Trainer" else ImportanceTrainer
    trainer = kind(model=new_model(arguments, len(train.unique("labels")), seed), args=args, train_dataset=train)
    trainer.train()
    share = [entry.get("importance/active_share", 0.0) for entry in trainer.state.log_history if "loss" in entry]
    trainer.compute_metrics = lambda found: {"error": float((found.predictions.argmax(-1) != found.label_ids).mean())}
    on_train, on_test = trainer.evaluate(train), trainer.evaluate(test)
    return {
        "train loss": on_train["eval_loss"],
        "test loss": on_test["eval_loss"],
        "test error": on_test["eval_error"],
        "drift": drift(trainer.model, train),
        "share on": share[-1],
    }


def main() -> None:
    """Run all rows, seeds interleaved, and print mean and standard error of each figure."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    folder = Path(arguments.dataset)
    train = load(folder / "train.parquet", arguments.side, arguments.examples)
    test = load(folder / "test.parquet", arguments.side)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.rows}
    for seed in range(arguments.seeds):
        for name in arguments.rows:
            results[name].append(run(name, arguments, train, test, seed))
            print(seed, name, results[name][-1], flush=True)
    names = list(next(iter(results.values()))[0])
    print(f"\n{arguments}\ntorch {torch.__version__}, transformers {transformers.__version__}")
    print("\n| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row, runs in results.items():
        cells = []
        for name in names:
            values = [figures[name] for figures in runs]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
