r"""Every figure that only an accelerator can give, by one command: steps, kappa, alpha, waits, memory, collectives.

    python examples/gpu.py --out results/                              # 8 minutes at most on one H100
    python examples/gpu.py --out results/ --quick                      # every part for real with tiny models, on a CPU
    python examples/gpu.py --out results/ --parts step-vit kappa --again
    python examples/gpu.py --out results/ --parts finetune --data path/to/data --models path/to/models

ViT-B/16 at 224 pixels, ResNet-50, BERT-base on texts of up to 128 tokens, a Llama of 1.2 B parameters on blocks of
512 and LoRA on it: random weights, and examples as ``natural_data.py`` makes them; bf16. Each part leaves a JSON file,
and a part that has one is left out, so the command goes on where it was ended. At its end it writes ``table.md``, for
docs/benchmarks.md, and ``figure.png`` of all that is there.

What is compared runs in one process, in turn, in an order that alternates: whole short runs of the Trainer and of
ImportanceTrainer, the first of each kind and the first steps of each run left out. Times are those between events on
the device's stream, which cost no wait, and on a CPU the process's own.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

# One process takes one device: of several visible ones the Trainer makes DataParallel. The collective part has all.
os.environ["ALL_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
os.environ["CUDA_VISIBLE_DEVICES"] = (os.environ["ALL_VISIBLE_DEVICES"] or "0").split(",")[0]

import numpy as np
import torch
import transformers
from benchmark_step import CLASSES, BenchmarkArguments, Forced, make_model, make_trainer
from gpu_report import report
from natural_data import blocks, pad, photographs, texts
from transformers import HfArgumentParser, Trainer, TrainerCallback

from hf_importance import ImportanceTrainer, Pool, Scored

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
BATCH = {"bert": 32, "vit": 64, "resnet": 64, "llama": 8, "lora": 8}
PRECISIONS = {
    "bf16": {"bf16": True},
    "fp32": {"bf16": False},
    "checkpointing": {"bf16": True, "activation_checkpointing": True},
    "compiled": {"bf16": True, "torch_compile": True},
}
# What makes the host wait for the device, as the profiler names it; on a CPU, where nothing waits, what would.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH (Device -> Pageable)",
         "aten::_local_scalar_dense", "aten::nonzero")  # fmt: skip
WARM_UP = 4  # steps of a run: the first is always uniform, the next allocate
SEEDS = (0, 1, 2)
# As in docs/costs.md, but on all examples.
FINE_TUNING = {
    "sst2": {"epochs": 3},
    "clothing": {"batch_norm": "frozen", "learning_rate": 3e-4},
    "cifar": {"batch_norm": "frozen"},
}


class Missing(Exception):
    """What a part needs is not there; the text says what."""


@dataclass
class Settings:
    """What is measured, and where it is written."""

    out: str = field(metadata={"help": "Folder of the JSON files, the table and the figure."})
    parts: list[str] = field(default_factory=list, metadata={"help": "Parts, or what their names begin with."})
    again: bool = field(default=False, metadata={"help": "Measure parts anew that are there."})
    quick: bool = field(default=False, metadata={"help": "Tiny models and few steps: that all works, no figures."})
    minutes: float = field(default=7.5, metadata={"help": "For all parts but fine-tuning. What would not fit waits."})
    workers: int = field(default=4, metadata={"help": "Processes that load images; texts need none."})
    data: str | None = field(default=None, metadata={"help": "Folder of the data sets of remembered_scores.py."})
    models: str | None = field(default=None, metadata={"help": "Folder of the models of remembered_scores.py."})


# ---- Time and memory ----


def mark() -> float | torch.Event:
    """Give a point in time: an event on the device's stream, or the seconds of this process."""
    if ACCELERATOR is None:
        return time.process_time()
    event = torch.Event(device=ACCELERATOR, enable_timing=True)
    event.record()
    return event


def seconds(start: float | torch.Event, end: float | torch.Event) -> float:
    """Give the seconds between two marks; waits for the second."""
    if isinstance(start, float) or isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def take_peak() -> float | None:
    """Give the peak of the device's memory since the last call, in MiB; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


class Times(TrainerCallback):
    """Marks, for each step, its start (the end of the one before), its forward pass, its gradients, and its end."""

    def __init__(self) -> None:
        self.marks: list[tuple] = []
        self.peaks: list[float | None] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start."""
        take_peak()
        self.last = mark()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Batches are read, scored and chosen."""
        self.begun = mark()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Gradients are there, and clipped."""
        self.gradients = mark()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Keep them."""
        self.marks.append((self.last, self.begun, self.gradients, mark()))
        self.peaks.append(take_peak())
        self.last = self.marks[-1][-1]

    def steps(self) -> list[float]:
        """Give the seconds of each step after the warm-up."""
        return [seconds(start, end) for start, _, _, end in self.marks[WARM_UP:]]

    def training(self) -> list[float]:
        """Give the seconds of forward and backward pass of each of them."""
        return [seconds(begun, gradients) for _, begun, gradients, _ in self.marks[WARM_UP:]]


class Marked(Forced):
    """Marks when a pool is asked for and when its scores are on the host: reading the reserve, and scoring."""

    def __post_init__(self) -> None:
        """Nothing was scored."""
        super().__post_init__()
        self.spans: dict[int, tuple] = {}
        self.peaks: list[float | None] = []

    def pool(self) -> Pool | None:
        """Begin."""
        take_peak()
        self.asked = mark()
        return super().pool()

    def keep(self, pool: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        """End."""
        self.spans[self.run.step()] = (self.asked, mark())
        self.peaks.append(take_peak())
        return super().keep(pool)


class Profiled(TrainerCallback):
    """Profiles the steps after the warm-up, and counts by name."""

    def __init__(self, steps: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile, self.steps = torch.profiler.profile(activities=activities), steps
        self.counts: dict[str, float] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Begin behind the warm-up, and end so many steps later."""
        if state.global_step == WARM_UP:
            self.profile.start()
        if state.global_step == WARM_UP + self.steps:
            self.profile.stop()
            found = {event.key: event.count / self.steps for event in self.profile.key_averages()}
            self.counts = {name: found.get(name, 0.0) for name in WAITS}


# ---- Runs ----


@functools.cache
def data_of(kind: str, quick: bool, even: bool) -> list:
    """Make the examples of a model; ``even``: texts of one length, as what is compiled wants them."""
    if kind == "llama":
        return blocks(64, 16, 256) if quick else blocks(512, 512, 128256)
    if kind == "bert":
        return texts(64 if quick else 4096, 16 if quick else 128, 256 if quick else 30522, CLASSES, even)
    # Each comes up several times an epoch, whose end would start new workers.
    return photographs(64, 32, CLASSES) if quick else 16 * photographs(256, 224, CLASSES)


class Bench:
    """One model and its examples, for all runs of a part."""

    def __init__(self, name: str, settings: Settings, even: bool = False) -> None:
        self.name, self.settings = name, settings
        self.kind = "llama" if name == "lora" else name
        self.batch = 8 if settings.quick else BATCH[name]
        self.data = data_of(self.kind, settings.quick, even)
        with torch.device(ACCELERATOR or "cpu"):
            self.model = make_model(self.kind, "tiny" if settings.quick else "full")
        if name == "lora":
            self.model = with_lora(self.model)
        self.workers = settings.workers if self.kind in ("vit", "resnet") and not settings.quick else 0
        if self.workers and shutil.disk_usage("/dev/shm").free < 4 * 2**30:
            print("Images are loaded by this process: /dev/shm has less than the 4 GiB that its workers may need.")
            self.workers = 0

    def run(self, kind: type[Trainer], steps: int, *callbacks: TrainerCallback, **options) -> Trainer:
        """Train so many steps after the warm-up, and give the trainer back."""
        gc.collect()  # a trainer is a circle, and holds its optimizer
        arguments = BenchmarkArguments(steps=steps + WARM_UP - 3)
        options = {
            "model": self.model,
            "data_collator": pad,
            "callbacks": list(callbacks),
            "per_device_train_batch_size": self.batch,
            "tau_threshold": 0.99 * self.batch**0.5,
            "bf16": True,
            "use_cpu": ACCELERATOR is None,
            "dataloader_num_workers": self.workers,
            **({"presample_ratio": "auto", "tau_threshold": None} if "sampler" in options else {}),
            **options,
        }
        trainer = make_trainer(kind, self.kind, self.data, arguments, **options)
        trainer.train()
        # Else the next trainer's autocast would wrap this one's.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return trainer

    def timed(self, kind: type[Trainer], **options) -> Times:
        """Time the steps of a run."""
        times = Times()
        self.run(kind, 4 if self.settings.quick else 16, times, **options)
        return times


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """Freeze a model, and give it adapters of rank 16 on queries and values."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    import peft

    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def in_rounds(things: dict[str, Callable], budget: float, quick: bool) -> dict[str, list]:
    """Do each once a round, in an order that alternates, five times or while it fits, after one to warm up."""
    found: dict[str, list] = {name: [] for name in things}
    end = time.perf_counter() + budget
    for turn in [1] if quick else range(6):
        started = time.perf_counter()
        for name in list(things) if turn % 2 else list(things)[::-1]:
            result = things[name]()
            if turn:
                found[name].append(result)
        if turn and 2 * time.perf_counter() - started > end:
            break
    return found


def spread(values: Iterable[float]) -> list[float]:
    """Give median, smallest and largest."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def over(these: list[float], those: list[float]) -> list[float]:
    """Give the spread of the ratios, pair by pair."""
    return spread(a / b for a, b in zip(these, those, strict=True))


def largest(peaks: Iterable[float | None]) -> float | None:
    """Give the largest peak, where there are any."""
    return max((peak for peak in peaks if peak is not None), default=None)


# ---- Parts ----


def step(bench: Bench, budget: float) -> dict:
    """Time plain, off and two kinds of importance steps; and what memory they take."""
    # A pool of three batches of which one is kept, the paper's; and of two of which a half is, what saves time.
    samplers = {"3b to b": (3.0, 1.0), "2b to b/2": (2.0, 0.5)}
    things: dict[str, Callable] = {
        "plain": lambda: bench.timed(Trainer),
        "off": lambda: bench.timed(ImportanceTrainer),
    }
    scored: dict[str, list] = {name: [] for name in samplers}
    for name, (ratio, share) in samplers.items():

        def on(name=name, ratio=ratio, share=share) -> Times:
            sampler = Marked(ratio, threshold=1.0001, share=share)
            times = bench.timed(ImportanceTrainer, sampler=sampler)
            scored[name] += sampler.peaks[WARM_UP:]
            times.peaks = [largest(pair) for pair in zip(times.peaks[1:], sampler.peaks, strict=True)]
            return times

        things[name] = on
    found = in_rounds(things, budget, bench.settings.quick)
    medians = {name: [statistics.median(times.steps()) for times in runs] for name, runs in found.items()}
    return {
        "batch": bench.batch,
        "rounds": len(found["plain"]),
        "ms": {name: spread(1000 * value for value in values) for name, values in medians.items()},
        "over plain": {name: over(values, medians["plain"]) for name, values in medians.items()},
        "peak MiB": {
            **{name: largest(p for times in runs for p in times.peaks[WARM_UP:]) for name, runs in found.items()},
            **{f"{name}, scoring": largest(peaks) for name, peaks in scored.items()},
        },
    }


def kappa(bench: Bench, budget: float, precision: str) -> dict:
    """Time scoring a pool against training on a batch, in steps that take turns; and what a run finds by itself."""
    options = dict(PRECISIONS[precision])
    if bench.settings.quick and precision == "compiled":
        options["torch_compile_backend"] = "eager"
    sampler = Marked(3.0, threshold=1.0001, in_turn=True)
    times = Times()
    # A compiled model meets each of its shapes and modes for the first time in as many steps.
    bench.run(ImportanceTrainer, 6 if bench.settings.quick else 24, times, sampler=sampler, **options)
    training, uniform = times.training(), range(WARM_UP, len(times.marks), 2)
    train = [training[number - WARM_UP] / bench.batch for number in uniform]
    score = [seconds(*sampler.spans[number + 1]) / (3 * bench.batch) for number in uniform]
    own = bench.run(ImportanceTrainer, 16, presample_ratio="auto", tau_threshold=None, **options)
    clock = own.sampler.run.clock
    return {
        "ms to score": spread(1000 * value for value in score),
        "ms to train": spread(1000 * value for value in train),
        "kappa": over(score, train),
        "own kappa": clock.kappa if clock.measured else None,
    }


def fixed_share(sizes: list[int], times: list[float]) -> float:
    """Give α of ``time of n = time of the largest b * (α + (1 - α) n / b)``, by least squares, in ``[0, 1]``."""
    slope, constant = np.polyfit(np.array(sizes) / max(sizes), times, 1)
    return min(max(float(constant / (constant + slope)), 0.0), 1.0)


def alpha(bench: Bench, budget: float) -> dict:
    """Time plain steps on small batches, and fit what of a step does not shrink with them."""
    sizes = [bench.batch // part for part in (8, 4, 2, 1) if bench.batch // part > 1]
    things = {
        str(size): lambda size=size: statistics.median(bench.timed(Trainer, per_device_train_batch_size=size).steps())
        for size in sizes
    }
    found = in_rounds(things, budget, bench.settings.quick)
    return {
        "ms": {name: spread(1000 * value for value in values) for name, values in found.items()},
        "alpha": spread(fixed_share(sizes, list(round_)) for round_ in zip(*found.values(), strict=True)),
    }


def waits(bench: Bench, budget: float) -> dict:
    """Count what makes the host wait for the device, a step, by the profiler."""
    steps = 3
    kinds = {"plain": (Trainer, {}), "off": (ImportanceTrainer, {}),
             "on": (ImportanceTrainer, {"sampler": Forced(3.0, threshold=1.0001)})}  # fmt: skip
    found = {}
    for name, (kind, options) in kinds.items():
        profiled = Profiled(steps)
        bench.run(kind, steps + 1, profiled, logging_steps=10**6, **options)
        found[name] = profiled.counts
    return {"a step": found}


def collective(settings: Settings, budget: float) -> dict:
    """Have another script measure the share of the sums over ranks: one process for each device."""
    environment = dict(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = environment["ALL_VISIBLE_DEVICES"]
    if not environment["CUDA_VISIBLE_DEVICES"]:  # all of the machine's
        del environment["CUDA_VISIBLE_DEVICES"]
    counted = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    count = int(subprocess.run(counted, env=environment, check=True, capture_output=True, text=True).stdout)
    if count < 2 and not settings.quick:
        raise Missing(f"{count or 'no'} GPU: not measured")
    file = Path(settings.out) / "collective.tmp"
    command = [sys.executable, str(Path(__file__).with_name("benchmark_collective.py")), "--json", str(file)]
    command += ["--processes", str(max(count, 2)), "--use_cpu", str(count < 2).lower(), "--repeats", "1"]
    subprocess.run(command + (["--steps", "2"] if settings.quick else []), env=environment, check=True)
    found = json.loads(file.read_text())
    file.unlink()
    return found


def finetune(settings: Settings, budget: float, name: str, seed: int) -> dict:
    """Fine-tune in full, plainly and with the method "auto"."""
    import presampling_equal_time as equal
    from remembered_scores import TASKS

    if settings.data is None or settings.models is None:
        raise Missing("it takes --data and --models")
    task = TASKS[name](Path(settings.data), Path(settings.models), count=256 if settings.quick else None)
    arguments = equal.Arguments(name, **FINE_TUNING[name])
    epochs = arguments.epochs or task.arguments["num_train_epochs"]
    steps = epochs * math.ceil(len(task.train) / task.arguments["per_device_train_batch_size"])
    rows = ("plain", "auto method")
    found = {row: equal.run(row, arguments, task, seed, steps, None) for row in rows[:: 1 if seed % 2 else -1]}
    return {row: found[row] for row in rows}


@dataclass
class Part:
    """What leaves one file.

    Attributes:
        name: Of the file.
        measure: Takes the settings and the seconds that it should take; gives what was found.
        seconds: That it takes on an H100, about.
    """

    name: str
    measure: Callable[[Settings, float], dict]
    seconds: float


def _on(name: str, measure: Callable[..., dict], budget: float, **options) -> Part:
    model = name.split("-")[1]

    def made(settings: Settings, budget: float) -> dict:
        bench = Bench(model, settings, even=options.get("precision") == "compiled")
        return measure(bench, budget, **options)

    return Part(name, made, budget)


def _kappas(precision: str, budget: float, *models: str) -> list[Part]:
    return [_on(f"kappa-{model}-{precision}", kappa, budget, precision=precision) for model in models]


# Most wanted first: what does not fit in the time is left out at the end.
PARTS = [
    _on("step-bert", step, 35),
    _on("waits-bert", waits, 10),
    *_kappas("bf16", 8, "bert", "vit", "resnet"),
    *_kappas("bf16", 15, "llama"),
    _on("step-vit", step, 40),
    _on("step-llama", step, 50),
    _on("alpha-bert", alpha, 15),
    _on("alpha-vit", alpha, 20),
    *_kappas("bf16", 15, "lora"),
    *_kappas("checkpointing", 10, "bert"),
    *_kappas("checkpointing", 15, "llama"),
    *_kappas("fp32", 10, "bert", "vit", "resnet"),
    _on("step-resnet", step, 30),
    _on("alpha-llama", alpha, 20),
    _on("waits-llama", waits, 10),
    *_kappas("compiled", 60, "bert"),
    _on("step-lora", step, 35),
    Part("collective", collective, 40),
    *(
        Part(f"finetune-{name}-{seed}", functools.partial(finetune, name=name, seed=seed), 0)
        for seed in SEEDS
        for name in FINE_TUNING
    ),
]


def about() -> dict:
    """Say where and when."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(ACCELERATOR or "CPU"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def measure_all(settings: Settings) -> tuple[dict[str, str], list[str]]:
    """Measure what is asked for and not there; give the reasons for what is left out, and what failed."""
    out, started = Path(settings.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    left_out, failed = {}, []
    for part in PARTS:
        file, optional = out / f"{part.name}.json", part.name.startswith("finetune")
        wanted = [name for name in settings.parts if f"{part.name}-".startswith(f"{name}-")]
        if not wanted and (settings.parts or (optional and settings.data is None)):
            continue
        there = file.exists() and json.loads(file.read_text())["quick"] == settings.quick
        if there and not settings.again:
            print(f"{part.name}: done before, {file}", flush=True)
            continue
        left = 60 * settings.minutes - (time.perf_counter() - started)
        if not optional and left < part.seconds:
            left_out[part.name] = f"it takes {part.seconds:.0f} s and {max(left, 0):.0f} s were left"
        else:
            begun, environment = time.perf_counter(), dict(os.environ)
            try:
                found = part.measure(settings, part.seconds)
                took = time.perf_counter() - begun
                file.write_text(json.dumps({**found, "seconds": took, "quick": settings.quick, **about()}, indent=1))
                print(f"{part.name}: {took:.0f} s", flush=True)
            except Missing as reason:
                left_out[part.name] = str(reason)
            except Exception:  # said at once and at the end; the other parts are worth having
                traceback.print_exc()
                failed.append(part.name)
            # Arguments leave in it what the next trainer would take for its own: mixed precision, compilation.
            os.environ.clear()
            os.environ.update(environment)
            gc.collect()
            torch.cuda.empty_cache()
        if part.name in left_out:
            print(f"{part.name}: skipped, {left_out[part.name]}", flush=True)
    return left_out, failed


def main() -> None:
    """Measure, report, and fail where a part did."""
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    unknown = [name for name in settings.parts if not any(f"{part.name}-".startswith(f"{name}-") for part in PARTS)]
    if unknown:
        raise SystemExit(f"There is no part {unknown[0]}, only {', '.join(part.name for part in PARTS)}.")
    left_out, failed = measure_all(settings)
    print(report(Path(settings.out), settings.quick, [part.name for part in PARTS], left_out, failed))
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
