"""What a step costs: scoring against a bare forward pass, an importance step against the cost rule, off against plain.

    python examples/benchmark_step.py                          # four models of a few million parameters, on a CPU
    python examples/benchmark_step.py --models bert --rounds 9
    python examples/benchmark_step.py --parts off no_harm      # whole runs of both trainers, in turn
    python examples/benchmark_step.py --parts passes layout    # what two scoring passes cost, and what the layout does

All that is compared runs in one process, in turn, round after round; a figure is the median over the rounds, with the
smallest and largest where it decides. Every optimizer step of an importance step goes through the trainer's own
methods. Results, with hardware and versions, stand in docs/benchmarks.md; real sizes on a GPU are gpu.py's.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_importance import (
    ImportanceMixin,
    ImportanceTrainer,
    ImportanceTrainingArguments,
    Pool,
    Presample,
)
from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.heads.choose import head_of
from hf_importance.heads.sliced import SlicedHead
from hf_importance.heads.tasks import TokenHead
from hf_importance.objective.scorer import Scorer, evaluation_mode

SMALL_ENCODER = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY_ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# Class, config, and what the sizes differ in; the full ones are ViT-B/16, ResNet-50, BERT-base and Llama 3.2 1B.
KINDS: dict[str, tuple[type[nn.Module], type, dict[str, dict]]] = {
    "vit": (
        ViTForImageClassification,
        ViTConfig,
        {
            "full": {},
            "small": {"image_size": 32, "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 6,
                      "num_attention_heads": 3, "intermediate_size": 768},
            "tiny": {"image_size": 32, "patch_size": 16, **TINY_ENCODER},
        },
    ),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig,
        {
            "full": {},
            "small": {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]},
            "tiny": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        },
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig,
        {
            "full": {},
            "small": {**SMALL_ENCODER, "intermediate_size": 1024},
            "tiny": {**TINY_ENCODER, "vocab_size": 256},
        },
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "full": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
            "small": {**SMALL_ENCODER, "intermediate_size": 768, "vocab_size": 8192},
            "tiny": {**TINY_ENCODER, "vocab_size": 256},
        },
    ),
    "mobilenet": (
        MobileNetV2ForImageClassification,
        MobileNetV2Config,
        {"small": {"depth_multiplier": 0.35}},
    ),
}  # fmt: skip
MODELS = tuple(KINDS)
CLASSES = 10
CONVOLUTIONS = ("resnet", "mobilenet")
PARTS = ("scoring", "step", "off", "no_harm", "passes", "layout")


@dataclass
class BenchmarkArguments:
    """What is measured, and how often."""

    models: list[str] = field(default_factory=lambda: list(MODELS[:4]), metadata={"help": f"Of {', '.join(MODELS)}."})
    parts: list[str] = field(default_factory=lambda: list(PARTS[:3]), metadata={"help": f"Of {', '.join(PARTS)}."})
    rounds: int = field(default=7, metadata={"help": "Times that each thing is measured, after one that is not."})
    batch_size: int = field(default=32, metadata={"help": "Examples a step; a quarter of it for the Llama."})
    presample_ratio: float = field(default=3.0, metadata={"help": "Pool size over batch size, of the step's row."})
    compiled: bool = field(default=False, metadata={"help": "Measure compiled scoring too: minutes of compilation."})
    steps: int = field(default=12, metadata={"help": "Timed steps of a run that compares whole trainers."})
    run_steps: int = field(default=150, metadata={"help": "Steps of a whole run, for no_harm."})


def now() -> float:
    """Give the time in seconds: of the wall with an accelerator, else of the CPU, which no other program changes."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


def make_model(name: str, size: str = "small") -> nn.Module:
    """Give a model from a config, not trained: what a step costs does not depend on the weights.

    Args:
        name: One of ``MODELS``.
        size: ``"full"``, the published model's; ``"small"``, a few million parameters; ``"tiny"``, a few thousand.
    """
    torch.manual_seed(0)
    kind, config, sizes = KINDS[name]
    classes = {} if name == "llama" else {"num_labels": CLASSES}
    return kind(config(**classes, **sizes[size]))


def make_data(name: str, examples: int = 768) -> Dataset:
    """Give random inputs of the model's shape, as columns that are quick to read."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, examples)
    if name in ("bert", "llama"):
        tokens = generator.integers(1, 30000 if name == "bert" else 8000, (examples, 64))
        labels = labels if name == "bert" else tokens
        columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    else:
        side = {"vit": 32, "resnet": 64, "mobilenet": 96}[name]
        columns = {"pixel_values": generator.random((examples, 3, side, side), dtype=np.float32), "labels": labels}
    return Dataset.from_dict(columns).with_format("numpy")


class Rows(torch.utils.data.Dataset):
    """A dataset held as tensors, so that loading is not what is measured."""

    def __init__(self, data: Dataset) -> None:
        self.columns = {name: torch.from_numpy(np.asarray(data[:][name])) for name in data.column_names}

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Give one example."""
        return {name: column[index] for name, column in self.columns.items()}


GIVEN_TO_THE_TRAINER = ("model", "data_collator", "callbacks", "compute_score_func", "sampler")


def make_trainer(kind: type[Trainer], name: str, data: Sized, settings: BenchmarkArguments, **options) -> Trainer:
    """Give a trainer that prints and saves nothing, of a model of its own where none is given."""
    size = settings.batch_size // 4 if name == "llama" else settings.batch_size
    defaults = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": size,
        "max_steps": settings.steps + 3,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "presample_ratio": 3.0,  # nothing to be measured
        "tau_threshold": 0.99 * size**0.5,  # never passed: off
    }
    given = {key: options.pop(key) for key in GIVEN_TO_THE_TRAINER if key in options}
    args = ImportanceTrainingArguments(**{**defaults, **options})
    trainer = kind(given.pop("model", None) or make_model(name), args=args, train_dataset=data, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_turn(things: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each thing once a round, in an order that alternates; the first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(rounds + 1):
        for name in list(things) if turn % 2 else list(things)[::-1]:
            started = now()
            things[name]()
            if turn:
                seconds[name].append(now() - started)
    return seconds


def ratios(over: list[float], under: list[float], factor: float = 1.0) -> str:
    """Give median, smallest and largest of the ratios round by round."""
    found = [factor * a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(found):6.3f} [{min(found):.3f}, {max(found):.3f}]"


def on_device(batch: dict[str, Tensor], trainer: Trainer) -> dict[str, Tensor]:
    """Give a batch where the model is."""
    return {name: value.to(trainer.args.device) for name, value in batch.items()}


def pool_of(trainer: Trainer, batches: list) -> PooledBatches:
    """Give the batches as a pool on the device; all rows are of one length."""
    return PooledBatches([on_device(batch, trainer) for batch in batches], Padding())


def scorer_of(trainer: Trainer, **settings) -> Scorer:
    """Give a scorer of a trainer's model as it makes one for itself."""
    model = trainer.model
    head = head_of(model, 0.0, None)
    sliced = SlicedHead(model, head) if isinstance(head, TokenHead) else None
    return Scorer(lambda: model, head, sliced=sliced, **settings)


def trains(trainer: Trainer, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Give what trains on a batch, forward and backward, and forgets the gradients."""

    def train() -> None:
        trainer.training_step(trainer.model, dict(batch))
        trainer.model.zero_grad()

    return train


def scoring(name: str, data: Rows, settings: BenchmarkArguments) -> None:
    """Print scoring against a bare forward pass under inference_mode, and kappa for each precision."""
    trainer = make_trainer(ImportanceTrainer, name, data, settings)
    own = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer_and_scheduler(settings.steps)
    pool, model = pool_of(trainer, [own]), trainer.model
    inputs = head_of(model, 0.0, None).model_inputs(pool.batches[0])

    def bare() -> None:
        with evaluation_mode(model), torch.inference_mode():
            model(**inputs)

    def score(**options) -> Callable[[], object]:
        scorer = scorer_of(trainer, **options)
        return lambda: scorer(pool).cpu()

    things = {"bare": bare, "train": trains(trainer, own), "as training": score()}
    things |= {dtype: score(dtype=dtype) for dtype in ("fp32", "bf16", "fp16")}
    if settings.compiled:
        things |= {"compiled": score(compile=torch.compile)}
        things |= {"compiled bf16": score(compile=torch.compile, dtype="bf16")}
    seconds = in_turn(things, settings.rounds)
    print(
        f"{name:7} bare forward {1000 * statistics.median(seconds['bare']):8.1f} ms, ours / bare "
        f"{ratios(seconds['as training'], seconds['bare'])}; "
        f"training {1000 * statistics.median(seconds['train']):8.1f} ms"
    )
    for kind in things:
        if kind not in ("bare", "train"):
            print(f"{'':7} kappa, {kind:14} {ratios(seconds[kind], seconds['train'])}", flush=True)


def passes(name: str, data: Rows, settings: BenchmarkArguments) -> None:
    """Print scoring a batch and an eighth of one in two passes, and in one, over training on the batch."""
    trainer = make_trainer(ImportanceTrainer, name, data, settings)
    own = next(iter(trainer.get_train_dataloader()))
    rest = {key: value[: max(len(value) // 8, 1)] for key, value in own.items()}
    pool = pool_of(trainer, [own, rest])
    things: dict[str, Callable[[], object]] = {"train": trains(trainer, own)}
    for dtype in ("fp32", "bf16"):
        scorer = scorer_of(trainer, dtype=dtype)
        things[f"two {dtype}"] = lambda scorer=scorer: scorer(pool).cpu()
        things[f"one {dtype}"] = lambda scorer=scorer: scorer(pool, len(pool)).cpu()
    seconds = in_turn(things, settings.rounds)
    for kind in things:
        if kind != "train":
            print(f"{name:7} {kind:9} {ratios(seconds[kind], seconds['train'])}", flush=True)


def layout(name: str, data: Rows, settings: BenchmarkArguments) -> None:
    """Print training and scoring in channels_last over the same in the usual layout, for convolutions."""
    if name not in CONVOLUTIONS:
        return
    things: dict[str, Callable[[], object]] = {}
    for form in (torch.contiguous_format, torch.channels_last):
        trainer = make_trainer(ImportanceTrainer, name, data, settings)
        trainer.model.to(memory_format=form)
        own = next(iter(trainer.get_train_dataloader()))
        pool = pool_of(trainer, [own])
        things[f"train {form}"] = trains(trainer, own)
        for dtype in ("fp32", "bf16"):
            scorer = scorer_of(trainer, dtype=dtype)
            things[f"{dtype} {form}"] = lambda scorer=scorer, pool=pool: scorer(pool).cpu()
    seconds = in_turn(things, settings.rounds)
    for kind in ("train", "fp32", "bf16"):
        usual, last = (seconds[f"{kind} {form}"] for form in (torch.contiguous_format, torch.channels_last))
        print(f"{name:7} {kind:6} channels_last / contiguous {ratios(last, usual)}", flush=True)


@dataclass
class Forced(Presample):
    """Presampling that is on whatever τ is and whatever it costs, for what an importance step takes.

    Attributes:
        share: Of a batch, that is kept.
        in_turn: Whether every second step is a uniform one.
    """

    share: float = 1.0
    in_turn: bool = False

    def pool(self) -> Pool | None:
        """Score a pool, and keep the share."""
        size = self.run.batch_size
        if self.in_turn and self.run.step() % 2 == 0:
            return None
        return Pool(math.ceil(self.ratio * size), max(round(self.share * size), 1))


class InTurnTimes(TrainerCallback):
    """Seconds of each step by its kind, from the end of the one before to its own end, and of scoring a batch.

    A batch is read and scored between two steps, so that all three meet the same load of the machine.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.seconds: dict[str, list[float]] = {"uniform": [], "importance": [], "score": []}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start."""
        self.scorer = scorer_of(self.trainer)
        loader = self.trainer.get_train_dataloader()
        self.batches = iter(batch for _ in iter(int, 1) for batch in loader)
        self.started = now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Keep the time, and score a batch; the first two steps warm up."""
        kind, took = "importance" if state.global_step % 2 == 0 else "uniform", now() - self.started
        started = now()
        self.scorer(pool_of(self.trainer, [next(self.batches)])).cpu()
        if state.global_step > 2:
            self.seconds[kind].append(took)
            self.seconds["score"].append(now() - started)
        self.started = now()


def step(name: str, data: Rows, settings: BenchmarkArguments) -> None:
    """Print whole optimizer steps: uniform, and by importance against what kappa * B + n predicts."""
    times = InTurnTimes()
    options = {"max_steps": 2 * settings.rounds + 2, "tau_threshold": None, "presample_ratio": "auto"}
    sampler = Forced(settings.presample_ratio, threshold=1.0001, in_turn=True)
    trainer = times.trainer = make_trainer(
        ImportanceTrainer, name, data, settings, **options, sampler=sampler, callbacks=[times]
    )
    trainer.train()
    seconds = times.seconds
    kappa = statistics.median(seconds["score"]) / statistics.median(seconds["uniform"])
    predicted = kappa * settings.presample_ratio + 1
    took = statistics.median(seconds["importance"]) / statistics.median(seconds["uniform"])
    print(
        f"{name:7} uniform step {1000 * statistics.median(seconds['uniform']):8.1f} ms, kappa {kappa:.3f}: importance "
        f"step / uniform {ratios(seconds['importance'], seconds['uniform'])}, predicted {predicted:.3f}, "
        f"took / predicted {took / predicted:.3f}",
        flush=True,
    )


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


def off(name: str, data: Rows, settings: BenchmarkArguments) -> None:
    """Print a step of ImportanceTrainer while off against one of the plain Trainer, whole runs in turn."""
    seconds: dict[type, list[float]] = {Trainer: [], ImportanceTrainer: []}
    for turn in range(settings.rounds):
        for kind in (Trainer, ImportanceTrainer) if turn % 2 else (ImportanceTrainer, Trainer):
            times = StepTimes()
            make_trainer(kind, name, data, settings, callbacks=[times]).train()
            seconds[kind].append(times.median())
    print(
        f"{name:7} plain step {1000 * statistics.median(seconds[Trainer]):8.1f} ms, off / plain "
        f"{ratios(seconds[ImportanceTrainer], seconds[Trainer])}, "
        f"what off adds {1000 * added_while_off(name, data, settings):.2f} ms, "
        f"with presample_ratio='auto' {1000 * added_while_off(name, data, settings, **AUTOMATIC):.2f} ms",
        flush=True,
    )


def alike(outputs: object, labels: Tensor) -> Tensor:
    """Score all examples the same: nothing is to be won."""
    return torch.ones(len(labels), device=labels.device)


# Nothing is measured, and nothing is to be won.
AUTOMATIC = {
    "presample_ratio": "auto",
    "tau_threshold": None,
    "importance_kwargs": {"kappa": 0.3},
    "compute_score_func": alike,
}


class Inside(Trainer):
    """Adds up the seconds of the plain Trainer's own hooks within those of ImportanceTrainer."""

    inside = 0.0

    def get_batch_samples(self, *args, **kwargs):
        """Read batches as the Trainer does."""
        started = now()
        found = super().get_batch_samples(*args, **kwargs)
        self.inside += now() - started
        return found

    def compute_loss(self, *args, **kwargs):
        """Compute the loss as the Trainer does."""
        started = now()
        found = super().compute_loss(*args, **kwargs)
        self.inside += now() - started
        return found


class Added(ImportanceMixin, Inside):
    """Keeps what ImportanceTrainer's hooks take in each step beside those of the plain Trainer."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.whole, self.steps = 0.0, []

    def get_batch_samples(self, *args, **kwargs):
        """Begin a step: what was added in the one before is known."""
        self.steps.append(self.whole - self.inside)
        self.whole = self.inside = 0.0
        started = now()
        found = super().get_batch_samples(*args, **kwargs)
        self.whole += now() - started
        return found

    def compute_loss(self, *args, **kwargs):
        """Compute the loss, and keep scores."""
        started = now()
        found = super().compute_loss(*args, **kwargs)
        self.whole += now() - started
        return found


def added_while_off(name: str, data: Rows, settings: BenchmarkArguments, **options) -> float:
    """Give the seconds of all that a switched-off step does more: score the logits, read the sums, average, decide."""
    trainer = make_trainer(Added, name, data, settings, **options)
    trainer.train()
    return statistics.median(trainer.steps[3:])  # before the first step there was none, and the next two warm up


def no_harm(name: str, data: Rows, settings: BenchmarkArguments) -> None:
    """Print a whole run with everything automatic and nothing to win, against one of the plain Trainer."""
    seconds: dict[type, list[float]] = {Trainer: [], ImportanceTrainer: []}
    automatic = {"presample_ratio": "auto", "tau_threshold": None, "max_steps": settings.run_steps}
    kappa = math.nan
    for turn in range(settings.rounds):
        for kind in (Trainer, ImportanceTrainer) if turn % 2 else (ImportanceTrainer, Trainer):
            options = automatic | ({"compute_score_func": alike} if kind is ImportanceTrainer else {})
            trainer = make_trainer(kind, name, data, settings, **options)
            started = now()
            metrics = trainer.train().metrics
            seconds[kind].append(now() - started)
            kappa = metrics.get("importance/kappa", kappa)
    print(
        f"{name:7} {settings.run_steps} steps: plain {statistics.median(seconds[Trainer]):8.1f} s, ours / plain "
        f"{ratios(seconds[ImportanceTrainer], seconds[Trainer])}, kappa {kappa:.3f}",
        flush=True,
    )


def main() -> None:
    """Print every part for every model."""
    (settings,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, batch {settings.batch_size}, {settings.rounds} rounds")
    measures = {f.__name__: f for f in (scoring, step, off, no_harm, passes, layout)}
    for part in settings.parts:
        print(f"\n{part}")
        for name in settings.models:
            data = Rows(make_data(name))
            measures[part](name, data, settings)


if __name__ == "__main__":
    main()
