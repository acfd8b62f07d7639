"""Systems trained for the same time each: the clock, the runs, the table and the curves that every experiment shares.

Time is what the paper's is: all that training takes, scoring and loading included; looking at the training loss and
the test error on the way is not counted. Without an accelerator it is CPU time, so that other programs do not count.
The learning rate follows the share of the time that is gone, as in the paper. Seeds are interleaved, and each starts
with another system.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import tasks
import torch
import transformers
from systems import System
from torch import nn
from transformers import TrainerCallback

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting import markdown
from hf_importance.reporting.spread import mean_and_spread

LOOKS = 8  # points of a curve
REPORTED = 1000  # training examples that the training loss is reported on


@dataclass
class Experiment:
    """What is trained, alike for every system.

    Attributes:
        new_model: Makes a model, for a seed that is set already.
        train: What is trained on.
        test: What is reported on.
        batch_size: b.
        ratio: B / b.
        tau_threshold: τ_th, with the root, as the authors' code has it; None: where it pays, by what is measured.
        learning_rate: At the start.
        seconds: Of training, for each run.
        schedule: Gives the factor of the learning rate for the share of the time that is gone.
        arguments: Further training arguments: optimizer, weight decay, clipping.
        recompute_every: Steps between two forward passes of online batch selection over all examples.
        looks: Points of a curve, where looking is dear; None: LOOKS.
    """

    new_model: Callable[[], nn.Module]
    train: tasks.Pictures
    test: tasks.Pictures
    batch_size: int
    ratio: float
    tau_threshold: float | None
    learning_rate: float
    seconds: float
    schedule: Callable[[float], float] = lambda gone: 1.0
    arguments: dict[str, Any] = field(default_factory=dict)
    recompute_every: int = 600  # recalled from the paper, whose text here has lost its numbers
    looks: int | None = None


def divided_by_five(gone: float) -> float:
    """Give the paper's schedule: the learning rate divided by 5 at 40 % and at 80 % of the time."""
    return 0.2 ** ((gone >= 0.4) + (gone >= 0.8))


def now() -> float:
    """Give the time in seconds: of the wall with an accelerator, else of this process's CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


class Clock(TrainerCallback):
    """Lets the learning rate follow the time, stops at its end, and calls ``look`` at even spaces on the way.

    Args:
        seconds: Of training.
        schedule: Factor of the learning rate for the share of the time that is gone.
        look: Called with the model, the trainer's state and the seconds gone; its own time does not count.
        looks: How often it is called.
    """

    def __init__(
        self, seconds: float, schedule: Callable[[float], float], look: Callable[..., None], looks: int
    ) -> None:
        self.seconds, self.schedule, self.look, self.looks = seconds, schedule, look, looks
        self.looked = 0
        self.started: float | None = None
        self.rates: list[float] = []

    def gone(self) -> float:
        """Give the share of the time that is gone."""
        return 0.0 if self.started is None else (now() - self.started) / self.seconds

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Start."""
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.started = now()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Set the learning rate."""
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.gone())

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Look, where it is time to, and stop at the end."""
        gone = self.gone()
        if gone >= (self.looked + 1) / self.looks or gone >= 1:
            paused = now()
            self.look(model, state, gone * self.seconds)
            self.looked = math.floor(gone * self.looks)  # a step may be longer than a space between two looks
            self.started += now() - paused
        control.should_training_stop = gone >= 1


@torch.no_grad()
def loss_and_error(model: nn.Module, part: tasks.Pictures) -> tuple[float, float]:
    """Give the mean loss and the share of wrong predictions, with the model as for evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    device = next(model.parameters()).device
    inputs = part.pixels.split(256)
    logits = torch.cat([model(**{part.name: some.to(device)}).logits.float().cpu() for some in inputs])
    for module, mode in modes:
        module.training = mode
    loss = nn.functional.cross_entropy(logits, part.labels)
    return float(loss), float((logits.argmax(-1) != part.labels).float().mean())


def run(name: str, system: System, experiment: Experiment, seed: int) -> list[dict[str, Any]]:
    """Train one system once for the experiment's time; give a row for each look, the last at the end."""
    transformers.set_seed(seed)
    rows: list[dict[str, Any]] = []
    reported, test = experiment.train.first(REPORTED), experiment.test.first(len(experiment.test))

    def look(model: nn.Module, state: transformers.TrainerState, seconds: float) -> None:
        train_loss, test_error = loss_and_error(model, reported)[0], loss_and_error(model, test)[1]
        logged = [entry for entry in state.log_history if "importance/tau" in entry and "loss" in entry]
        last = logged[-1] if logged else {}
        rows.append(
            {
                "system": name,
                "seed": seed,
                "seconds": seconds,
                "step": state.global_step,
                "train_loss": train_loss,
                "test_error": test_error,
                "tau": last.get("importance/tau", 1.0),
                "kappa": last.get("importance/kappa", math.nan),
                "active_share": statistics.mean(e["importance/active_share"] for e in logged) if logged else 0.0,
                "scored": last.get("importance/examples_scored", math.nan),
                "trained": last.get("importance/examples_trained", math.nan),
            }
        )

    clock = Clock(experiment.seconds, experiment.schedule, look, experiment.looks or LOOKS)
    chosen, options = dict(system.arguments), {}
    if system.sampler is None:
        chosen = {"presample_ratio": experiment.ratio, "tau_threshold": experiment.tau_threshold, **chosen}
    else:
        options["sampler"] = system.sampler(experiment, clock.gone)
    with tempfile.TemporaryDirectory() as folder:
        args = ImportanceTrainingArguments(
            folder,
            seed=seed,
            per_device_train_batch_size=experiment.batch_size,
            learning_rate=experiment.learning_rate,
            max_steps=10_000_000,  # it is the clock that ends a run
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            importance_log="all",
            dataloader_pin_memory=torch.accelerator.is_available(),
            **{"logging_steps": 10, **experiment.arguments, **chosen},
        )
        trainer = ImportanceTrainer(
            model=experiment.new_model(), args=args, train_dataset=experiment.train, callbacks=[clock], **options
        )
        for callback in system.callbacks:
            trainer.add_callback(callback(trainer))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    if not rows or rows[-1]["seconds"] < experiment.seconds:
        raise RuntimeError(f"{name} stopped after {trainer.state.global_step} steps, before its time was over.")
    return rows


def run_all(
    experiment: Experiment, systems: dict[str, System], seeds: Sequence[int], **columns: Any
) -> list[dict[str, Any]]:
    """Run all systems with all seeds, interleaved; ``columns`` stand in every row."""
    rows, names = [], list(systems)
    for place, seed in enumerate(seeds):
        shift = place % len(names)
        for name in names[shift:] + names[:shift]:
            found = run(name, systems[name], experiment, seed)
            rows += [{**columns, **row} for row in found]
            print(seed, name, {k: f"{v:.4g}" for k, v in found[-1].items() if isinstance(v, float | int)}, flush=True)
    return rows


def finals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the last row of each run."""
    last: dict[tuple, dict] = {}
    for row in rows:
        last[row["system"], row["seed"]] = row
    return list(last.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Give mean ± standard deviation over the seeds, at the end of the time, as Markdown."""
    columns = ("train_loss", "test_error", "step", "seconds", "active_share", "tau")
    lines, ends = [], finals(rows)
    for name in dict.fromkeys(row["system"] for row in rows):
        found = [row for row in ends if row["system"] == name]
        lines.append([name, len(found), *(mean_and_spread([row[column] for row in found]) for column in columns)])
    return markdown.table(["system", "seeds", *columns], lines)


LINES = 4  # of a panel, beside uniform's
HEIGHT = 3.4  # inches of a row of panels


def draw_curves(rows: list[dict[str, Any]], styles: dict[str, tuple[str, str]], made: str, file: Path) -> None:
    """Draw training loss and test error against time: means, and the range of the seeds at the end.

    A row of panels has a few systems, with uniform training in each. Those that never went on are the same training
    as uniform and are named, not drawn.

    Args:
        rows: As :func:`run_all` gives them.
        styles: Colour and line of each system.
        made: How they came about.
        file: The figure.
    """
    off = [name for name in styles if name != "uniform" and not any(on(row) for row in rows if row["system"] == name)]
    shown = [name for name in styles if name not in off and name != "uniform"]
    groups = [shown[start : start + LINES] for start in range(0, len(shown), LINES)] or [[]]
    figure, panels = figures.new_figure(9, HEIGHT * len(groups) + 0.8, 2, rows=len(groups), sharex=True, sharey="col")
    for number, group in enumerate(groups):
        pair = panels[2 * number : 2 * number + 2]
        for place, name in enumerate([*(name for name in styles if name == "uniform"), *group]):
            runs: dict[int, list[dict]] = {}
            for row in rows:
                if row["system"] == name:
                    runs.setdefault(row["seed"], []).append(row)
            for panel, column in zip(pair, ("train_loss", "test_error"), strict=True):
                draw_mean(panel, list(runs.values()), column, *styles[name], name.replace("_", " "), place)
        pair[0].set_ylabel("training loss")
        pair[1].set_ylabel("test error")
        pair[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figures.log_scale(panels[0])
    if all(row["test_error"] > 0 for row in rows):
        figures.log_scale(panels[1])
    for panel in panels[-2:]:
        panel.set_xlabel(clock_name())
    said = ["The same time for each: mean of the seeds, and their range at the end; uniform in every row"]
    if off:
        said.append(f"Stayed off, the same as uniform: {', '.join(name.replace('_', ' ') for name in off)}")
    figure.suptitle("\n".join(said), x=0.01, ha="left", fontsize=9)
    figures.save(figure, file, made, (row["seed"] for row in rows))


def on(row: dict[str, Any]) -> bool:
    """Say whether importance sampling was on before this look."""
    return row["active_share"] > 0


def draw_mean(
    panel: Any, runs: list[list[dict]], column: str, color: str, line: str, label: str, place: int = 0
) -> None:
    """Draw the mean over runs at each look, and the range of their ends; ``place`` sets ranges side by side."""
    # A run whose steps are long may have missed a look.
    looks = min(len(run) for run in runs)
    runs = [run[-looks:] for run in runs]
    x = [statistics.mean(run[i]["seconds"] for run in runs) for i in range(looks)]
    y = [statistics.mean(run[i][column] for run in runs) for i in range(looks)]
    panel.plot(x, y, line, color=color, label=label, lw=1.6)
    ends = [run[-1][column] for run in runs]
    panel.plot([x[-1] * (1.02 + 0.02 * place)] * 2, [min(ends), max(ends)], "_-", color=color, ms=6, clip_on=False)


def clock_name() -> str:
    """Say what the time axis measures."""
    return "seconds" if torch.accelerator.is_available() else "CPU seconds"


def parser(doc: str, systems: dict[str, System]) -> argparse.ArgumentParser:
    """Give the arguments that every script has."""
    found = argparse.ArgumentParser(description=doc.split("\n")[0])
    found.add_argument("--full", action="store_true", help="The paper's setting.")
    found.add_argument("--dataset", help="digits, cifar10, cifar100, ..., a Hub id, or a folder.")
    found.add_argument("--data", default=tasks.data_folder(), help="Folder of data sets; else HF_IMPORTANCE_DATA.")
    found.add_argument("--side", type=int, help="Pictures are scaled to squares of this many pixels.")
    found.add_argument("--limit", type=int, help="Training examples, at most.")
    found.add_argument("--seconds", type=float, help="Of training, for each run.")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--systems", nargs="+", choices=systems, default=list(systems))
    found.add_argument("--batch_size", type=int, help="b")
    found.add_argument("--learning_rate", type=float)
    found.add_argument("--tau_threshold", type=float, help="With the root, as the authors' code has it.")
    found.add_argument("--output", type=Path, default=Path("runs/paper"), help="Folder of CSV files and figures.")
    return found


def prepare() -> str:
    """Make the machine quiet and fair, and say how what follows comes about."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # CPU time would count each thread
    return figures.provenance()


def overrides(experiment: Experiment, given: argparse.Namespace) -> Experiment:
    """Put what the command line says in the place of the experiment's own."""
    for name in ("seconds", "batch_size", "learning_rate", "tau_threshold"):
        if getattr(given, name) is not None:
            setattr(experiment, name, getattr(given, name))
    return experiment


def styles(systems: dict[str, System], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give colour and line of systems."""
    return {name: (systems[name].color, systems[name].line) for name in names}


def compare(
    given: argparse.Namespace,
    experiment: Callable[[argparse.Namespace], Experiment],
    systems: dict[str, System],
    file: str,
) -> None:
    """Compare systems at equal time, as the arguments say: CSV, table, curves."""
    made = prepare()
    chosen = {name: systems[name] for name in given.systems}
    rows = run_all(overrides(experiment(given), given), chosen, given.seeds)
    figures.write(given.output / f"{file}.csv", rows, made)
    draw_curves(rows, styles(systems, list(chosen)), made, given.output / f"{file}.png")
    print(f"\n{made}\n\n{table(rows)}")
