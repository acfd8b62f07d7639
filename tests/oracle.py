"""Short training runs and what they gave, to the last bit: whatever changes inside must train the same.

    python tests/oracle.py record tests/oracle.json
    python tests/oracle.py compare tests/oracle.json --only "presample" "two ranks, history"

A run gives the hash of its parameters, and its log without what was timed. Of the package it takes the trainer and its
arguments, so that it can be imported from another version: ``PYTHONPATH=that/version``. Floating point differs between
machines and versions of torch: record and compare on one. "canary" is the plain Trainer's, which tells whether it is.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback

import hf_importance
from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.testing import leave_processes

BATCH = 16
SECONDS = 240  # a hang is a failure
TIMED = ("_runtime", "_per_second", "scoring_time_share", "scoring_seconds")
MEASURED = ("/kappa", "/overhead")  # timed too, unless the run says what they are
# What the arguments that became keys of importance_kwargs were called before.
OLD_NAMES = {
    "momentum": "tau_momentum",
    "margin": "variance_margin",
    "share": "uniform_share",
    "resampling": "resampling",
    "bias": "weight_exponent",
}
FIELDS = {field.name for field in fields(ImportanceTrainingArguments)}
TAKES_KWARGS = "importance_kwargs" in FIELDS


# ---- The toy ----


def bert(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def sentences(examples: int, noisy: bool = False) -> Dataset:
    """Token sequences whose first token tells the class, but for one in twelve where ``noisy``."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 50, (examples, 6))
    labels = generator.integers(0, 4, examples)
    tokens[:, 0] = labels
    if noisy:
        labels[::12] = np.random.default_rng(1).integers(0, 4, len(labels[::12]))
    return Dataset.from_dict(
        {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    ).with_format("torch")


def persistent(outputs, labels):
    """One class in four has ten times the score: what is remembered stays true."""
    return 1.0 + 9.0 * (labels == 0).float()


def forgetful(outputs, labels):
    """One example in eight of any batch has all the score: nothing worth remembering."""
    return (torch.arange(len(labels)) % 8 == 0).float()


# ---- The runs ----


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        settings: Arguments, by their names in ``ImportanceTrainingArguments``.
        kwargs: Those of the method's own, by their names in ``importance_kwargs``.
        sources: By what its steps are drawn, in order, which is checked when it is recorded.
        resume: Step after which, or ``within`` which, a checkpoint is saved, to be gone on from.
    """

    settings: dict
    kwargs: dict = field(default_factory=dict)
    examples: int = 128
    noisy: bool = False
    stream: bool = False
    score: Callable | None = None
    dropout: float = 0.1
    resume: int | None = None
    within: bool = False
    ranks: int = 1
    sources: tuple = ("presample",)


def presample(kwargs: dict | None = None, **settings) -> dict:
    """Give the paper's pools, on from the second step on."""
    settings = {"importance_budget": "variance", "presample_ratio": 3.0, "tau_threshold": 1.0 + 1e-9, **settings}
    return {"settings": settings, "kwargs": {"momentum": 0.0, **(kwargs or {})}, "noisy": True}


def priced(budget: str, **settings) -> dict:
    """Give pools of whatever size is cheapest, on while they pay."""
    settings = {"importance_method": "presample", "importance_budget": budget, "max_steps": 96, **settings}
    return {
        "settings": settings,
        "kwargs": {"kappa": 0.1},
        "examples": 256,
        "noisy": True,
        "sources": ("uniform", "presample"),
    }


def history(budget: str, **settings) -> dict:
    settings = {"importance_method": "history", "importance_budget": budget, "max_steps": 320, **settings}
    return {
        "settings": {"logging_steps": 20, **settings},
        "kwargs": {"margin": 1.0},
        "examples": 512,
        "noisy": True,
        "sources": ("uniform", "history"),
    }


def shorter(run: dict, **settings) -> dict:
    settings = {"gradient_accumulation_steps": 2, "max_steps": 64, **settings}
    return {**run, "examples": 256, "settings": {**run["settings"], **settings}}


def auto(**settings) -> dict:
    settings = {"importance_method": "auto", "importance_budget": "constant_variance", "max_steps": 160, **settings}
    return {"settings": settings, "kwargs": {"kappa": 0.1}, "examples": 256}


OFF = {"tau_threshold": 3.9}
ACCUMULATED = {"gradient_accumulation_steps": 2}
MID = {"within": True, "dropout": 0.0}  # a step that is taken twice draws another dropout

RUNS = {
    "off": Run(**{**presample(**OFF), "sources": ("uniform",)}, examples=100),
    "presample": Run(**presample()),
    "presample, accumulated": Run(**presample(gradient_accumulation_steps=3), examples=100),
    "presample, multinomial": Run(**presample(kwargs={"resampling": "multinomial"})),
    "presample, biased": Run(**presample(kwargs={"bias": 0.5}, importance_score="loss")),
    "presample, workers": Run(**presample(dataloader_num_workers=2)),
    "presample, stream": Run(**presample(), examples=320, stream=True),
    "priced, constant_variance": Run(**priced("constant_variance")),
    "priced, variance": Run(**priced("variance")),
    "priced, constant_time": Run(**priced("constant_time")),
    "history, variance": Run(**history("variance")),
    "history, constant_variance": Run(**history("constant_variance")),
    "auto, persistent": Run(**auto(), score=persistent, sources=("presample", "history")),
    "auto, forgetful": Run(**auto(), score=forgetful),
    # Step 40 is by pools.
    "auto, bound": Run(**auto(), noisy=True, resume=40, sources=("uniform", "presample", "history")),
    "presample, resumed after a step": Run(**presample(**ACCUMULATED), resume=21),
    "presample, resumed within a step": Run(**presample(**ACCUMULATED), resume=21, **MID),
    "history, resumed after a step": Run(**shorter(history("constant_variance")), resume=43),
    "history, resumed within a step": Run(**shorter(history("constant_variance")), resume=43, **MID),
    "stream, resumed after a step": Run(**presample(), examples=320, stream=True, resume=21),
    "auto, resumed after a step": Run(**auto(max_steps=64), noisy=True, resume=50, sources=("uniform", "history")),
    "auto, resumed within a step": Run(
        **auto(max_steps=64, **ACCUMULATED), score=persistent, resume=14, **MID, sources=("presample", "history")
    ),
    "two ranks, off": Run(**{**presample(**OFF), "sources": ("uniform",)}, ranks=2),
    "two ranks, presample, accumulated": Run(**presample(**ACCUMULATED), ranks=2),
    "two ranks, history": Run(**shorter(history("variance")), resume=43, ranks=2),
}
# Those that tell most in the least time.
FAST = (
    "off",
    "presample, accumulated",
    "presample, multinomial",
    "presample, stream",
    "priced, variance",
    "auto, bound",
    "presample, resumed within a step",
    "history, resumed after a step",
)


def arguments(folder: Path, run: Run) -> ImportanceTrainingArguments:
    """Give a run's arguments, in this version's words."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH // run.ranks,
        "max_steps": 48,
        "logging_steps": 8,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
        "presample_ratio": "auto",
        **run.settings,
    }
    if run.resume is not None and not run.within:
        settings |= {"save_strategy": "steps", "save_steps": run.resume}
    if "importance_log" in FIELDS:
        settings["importance_log"] = "all"
    if TAKES_KWARGS:
        settings["importance_kwargs"] = run.kwargs
    else:
        settings |= {OLD_NAMES[name]: value for name, value in run.kwargs.items() if name != "kappa"}
    return ImportanceTrainingArguments(**settings)


class Watch(TrainerCallback):
    """Counts steps, and may save in the middle of an accumulated one, as a just-in-time checkpoint does."""

    def __init__(self, save_within: int | None) -> None:
        self.save_within, self.steps, self.trainer = save_within, 0, None

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.save_within:
            self.trainer._save_checkpoint(self.trainer.model, None)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1


def train(folder: Path, run: Run, resume: Path | None = None) -> Trainer:
    data = sentences(run.examples, run.noisy)
    watch = Watch(run.resume if run.within and resume is None else None)
    watch.trainer = trainer = ImportanceTrainer(
        model=bert(run.dropout),
        args=arguments(folder, run),
        train_dataset=data.to_iterable_dataset() if run.stream else data,
        callbacks=[watch],
        **({} if run.score is None else {"compute_score_func": run.score}),
    )
    trainer.remove_callback(PrinterCallback)
    if "kappa" in run.kwargs and not TAKES_KWARGS:
        begin = trainer._begin_importance
        trainer._begin_importance = lambda: (begin(), trainer._meter.load(run.kwargs["kappa"]))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert watch.steps == trainer.args.max_steps - (0 if resume is None else run.resume)
    return trainer


def hashed(trainer: Trainer) -> str:
    found = hashlib.sha256()
    for value in trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict().values():
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def timeless(entries: list[dict], run: Run) -> list[dict]:
    """Take what was timed out of a log."""
    timed = TIMED if "kappa" in run.kwargs else TIMED + MEASURED
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in entries]


def result(run: Run, folder: Path) -> dict:
    """Train, and give what came of it; in the world that the run is for, whose ranks share a folder."""
    trainer = train(folder / "whole", run)
    assert trainer.args.world_size == run.ranks
    found = {"parameters": hashed(trainer), "log": timeless(trainer.state.log_history, run)}
    if run.resume is not None:
        resumed = train(folder / "resumed", run, folder / "whole" / f"checkpoint-{run.resume}")
        found["resumed"] = hashed(resumed)
    return found


def canary() -> str:
    """Give the hash of what the plain Trainer makes of the toy."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), Run(ACCUMULATED))
        trainer = Trainer(model=bert(0.1), args=args, train_dataset=sentences(128))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return hashed(trainer)


def launched(names: list[str]) -> dict[str, dict]:
    """Run those that are for two ranks, in one launch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        process = subprocess.Popen(
            [*command, "rank", folder, "--only", *names],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed, _ = process.communicate(timeout=SECONDS)
        finally:
            process.terminate()  # a launcher ends its processes when it is told to, not when it is killed
            process.wait(timeout=60)
        ranks = [Path(folder, f"{rank}.json") for rank in range(2)]
        if process.returncode:
            raise RuntimeError(printed[-5000:])
        first, second = (json.loads(file.read_text()) for file in ranks)
    for name in names:
        if first[name]["parameters"] != second[name]["parameters"]:
            raise RuntimeError(f"{name}: the ranks end with different parameters")
    return first


def on_this_rank(folder: str, names: list[str]) -> None:
    found = {name: result(RUNS[name], Path(folder, name)) for name in names}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave_processes()


def results(names: list[str]) -> Iterator[tuple[str, dict]]:
    """Run these, and give what each gave; ``{"error": text}`` where it failed."""
    for name in names:
        if RUNS[name].ranks == 1:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = result(RUNS[name], Path(folder))
                except Exception:
                    found = {"error": traceback.format_exc()}
            yield name, found
    together = [name for name in names if RUNS[name].ranks > 1]
    if together:
        try:
            yield from launched(together).items()
        except Exception:
            yield from ((name, {"error": traceback.format_exc()}) for name in together)


# ---- Recording ----


def sources(log: list[dict]) -> list[str]:
    """Give by what the steps were drawn at each training log, without repetition."""
    found = []
    for entry in log:
        if "loss" in entry and "importance/active" in entry:
            kind = "uniform"
            if entry["importance/active"]:
                presampling = entry.get("importance/presampling", "importance/gain" not in entry)
                kind = "presample" if presampling else "history"
            if not found or found[-1] != kind:
                found.append(kind)
    return found


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__}


def record(file: Path, names: list[str]) -> int:
    """Write down what runs give, beside what the file has of others, if it was recorded here."""
    recorded = {"versions": versions(), "canary": canary(), "runs": {}}
    if file.exists():
        before = json.loads(file.read_text())
        if all(before[what] == recorded[what] for what in ("versions", "canary")):
            recorded["runs"] = before["runs"]
    for name, found in results(names):
        if "error" in found:
            print(f"{name}: {found['error']}")
            return 1
        drawn, expected = sources(found["log"]), RUNS[name].sources
        print(f"{name}: {found['parameters'][:12]}, {' -> '.join(drawn)}", flush=True)
        assert drawn[: len(expected)] == list(expected), (name, drawn)
        assert found.get("resumed", found["parameters"]) == found["parameters"], name
        recorded["runs"][name] = found
    file.write_text(json.dumps(recorded))
    return 0


# ---- Comparing ----


def differences(recorded: dict, found: dict) -> tuple[list[str], list[str]]:
    """Give what is wrong with a run, and what is merely other."""
    if "error" in found:
        return [found["error"]], []
    wrong = []
    if found["parameters"] != recorded["parameters"]:
        wrong.append("parameters differ")
    if found.get("resumed", found["parameters"]) != found["parameters"]:
        wrong.append("the resumed run's parameters are not the uninterrupted run's")
    logs = [
        {(kind, e["step"]): e for e in run["log"] for kind in ("loss", "train_loss") if kind in e}
        for run in (recorded, found)
    ]
    if logs[0].keys() != logs[1].keys():
        wrong.append(f"entries of one log alone: {sorted(logs[0].keys() ^ logs[1].keys())}")
    shared = [(step, logs[0][kind, step], logs[1][kind, step]) for kind, step in logs[0] if (kind, step) in logs[1]]
    unequal: dict[str, list[str]] = {}
    for step, before, now in shared:
        for key in before:
            if key in now and not same(before[key], now[key]):
                unequal.setdefault(key, []).append(f"step {step}: {before[key]} -> {now[key]}")
    wrong += [f"{key} differs at {len(at)} entries: {'; '.join(at[:3])}" for key, at in unequal.items()]
    missing = sorted({key for _, before, now in shared for key in before if key not in now})
    new = sorted({key for _, before, now in shared for key in now if key not in before})
    return wrong, [f"{what} keys: {', '.join(k)}" for what, k in {"missing": missing, "new": new}.items() if k]


def same(one: object, other: object) -> bool:
    return one == other or all(isinstance(x, float) and math.isnan(x) for x in (one, other))


def compare(file: Path, names: list[str]) -> int:
    recorded = json.loads(file.read_text())
    for what, now in {"versions": versions(), "canary": canary()}.items():
        if recorded[what] != now:
            print(f"Nothing need be equal here, for of {what} this is {now}, not {recorded[what]}.")
    bad = []
    for name, found in results([name for name in names if name in recorded["runs"]]):
        wrong, other = differences(recorded["runs"][name], found)
        print(f"{name}: {'DIFFERENT' if wrong else 'equal'}", flush=True)
        for line in wrong + other:
            print(f"    {line}", flush=True)
        bad += [name] * bool(wrong)
    print(f"{len(bad)} differ: {', '.join(bad)}" if bad else "All equal.")
    return int(bool(bad))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "compare", "rank"])
    parser.add_argument("file")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if given.command == "rank":
        on_this_rank(given.file, given.only)
        return 0
    print(f"hf_importance of {hf_importance.__file__}", flush=True)
    return {"record": record, "compare": compare}[given.command](Path(given.file), given.only)


if __name__ == "__main__":
    sys.exit(main())
