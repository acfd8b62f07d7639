"""The figure of a run: loss, τ with its threshold and switches, gain, and the weights, against the optimizer step.

Needs matplotlib: ``pip install 'hf_importance[plots]'``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer

from hf_importance.reporting.report import PREFIX, WEIGHT_EDGES, relative_compute

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
except ImportError as error:
    raise ImportError(
        "The figure of a run is drawn with matplotlib, which is not installed: pip install 'hf_importance[plots]'."
    ) from error

Log = Sequence[Mapping[str, Any]]

# Okabe and Ito, 2008: told apart by colour-blind readers too.
BLUE, VERMILLION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
ON = {"color": VERMILLION, "alpha": 0.10, "linewidth": 0}
STATE = "trainer_state.json"
# Panels below the loss and beside τ, where the log has the key: title with its unit, and the range's lower end.
PANELS = {
    "gain": ("gain (uniform batches that one is worth)", 0),
    "effective_sample_size": ("effective sample size (examples of a micro-batch)", 0),
    "max_weight": ("largest weight (times a uniform example's)", 0),
    "skipped_share": ("examples skipped (share)", 0),
    "price_presample": ("price of presampling (uniform steps of the same noise)", 0),
    "table_age": ("age of the remembered scores (steps)", 0),
}


def plot_training(source: Trainer | Log | str | Path, file: str | Path | None = None) -> Figure:
    """Draw what importance sampling did in one run. What the log does not hold is left out.

    Args:
        source: A trainer, its ``state.log_history``, or a folder: a checkpoint, or an output folder that holds some.
        file: Where to save the figure too; its suffix says how.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ValueError: No training loss was logged yet.
        FileNotFoundError: The folder holds no ``trainer_state.json``, nor does a checkpoint in it.
    """
    log = _log_of(source)
    losses = [entry for entry in log if "loss" in entry]
    if not losses:
        raise ValueError("No entry of the log has a training loss: train for more steps than logging_steps first.")
    ours = [entry for entry in losses if PREFIX + "tau" in entry]
    names = [name for name in PANELS if any(_value(entry, name) is not None for entry in ours)]
    names = ["tau", *names] if ours else []
    counts = source.importance_weights() if hasattr(source, "importance_weights") else None
    histogram = counts is not None and int(counts.sum()) > 0
    rows = 1 + (len(names) + 1) // 2 + histogram
    figure = Figure(figsize=(9, 0.9 + 2.3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    first = _loss(figure.add_subplot(grid[0, :]), log, losses)
    every = [first]
    spans = _spans(log)
    for number, name in enumerate(names):
        alone = number == len(names) - 1 and number % 2 == 0
        columns = slice(None) if alone else number % 2
        axes = figure.add_subplot(grid[1 + number // 2, columns], sharex=first)
        every.append(axes)
        if name == "tau":
            _tau(axes, log, ours)
        else:
            _panel(axes, name, ours)
    for axes in every:
        _against_steps(axes, spans, last=axes.get_subplotspec().rowspan.stop == rows - histogram)
    first.set_xlim(0, log[-1]["step"] * 1.01)
    if histogram:
        _weights(figure.add_subplot(grid[-1, :]), counts)
    if ours:
        figure.suptitle(_summary(log, ours), x=0.01, ha="left", fontsize=10.5)
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure


def _against_steps(axes: Axes, spans: list[tuple[int, int]], last: bool) -> None:
    """Shade the steps in which it was on; name the axis in the last row."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    for start, end in spans:
        axes.axvspan(start, end, **ON)
    if last:
        axes.set_xlabel("optimizer step")


def _log_of(source: Trainer | Log | str | Path) -> Log:
    if isinstance(source, Trainer):
        return source.state.log_history
    if not isinstance(source, str | Path):
        return source
    folder = Path(source)
    states = [
        folder / STATE,
        *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda file: file.stat().st_mtime)[::-1],
    ]
    for state in states:
        if state.exists():
            return json.loads(state.read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(
        f"{folder} holds no {STATE}, and no checkpoint in it does. Pass a checkpoint's folder, or call "
        "trainer.save_state() at the end of training."
    )


def _value(entry: Mapping[str, Any], name: str) -> float | None:
    if name == "gain":  # measured where the method does, else what τ promises
        return entry.get(PREFIX + "gain", entry.get(PREFIX + "batch_size_gain"))
    return entry.get(PREFIX + name)


def _loss(axes: Axes, log: Log, losses: Log) -> Axes:
    axes.plot([e["step"] for e in losses], [e["loss"] for e in losses], color=BLUE, label="training")
    evaluated = [entry for entry in log if "eval_loss" in entry]
    if evaluated:
        steps, values = [e["step"] for e in evaluated], [e["eval_loss"] for e in evaluated]
        axes.plot(steps, values, "o-", color=BLACK, markersize=4, linewidth=1, label="evaluation")
    on = [Patch(label="importance sampling on", **ON)] if _spans(log) else []
    axes.legend(handles=[*axes.get_lines(), *on], frameon=False, fontsize=9)
    if min(entry["loss"] for entry in losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("loss", loc="left", fontsize=10)
    return axes


def _tau(axes: Axes, log: Log, ours: Log) -> None:
    steps = [entry["step"] for entry in ours]
    axes.plot(steps, [e[PREFIX + "tau"] for e in ours], color=VERMILLION, label="τ")
    threshold = [
        (entry["step"], entry[PREFIX + "tau_threshold"]) for entry in ours if PREFIX + "tau_threshold" in entry
    ]
    if threshold:  # other methods do not go by one
        axes.plot(*zip(*threshold, strict=True), color=BLACK, linestyle=":", label="threshold")
    for active, marker, label in ((True, "^", "goes on"), (False, "v", "goes off")):
        switched = [step for step, on in _switches(log) if on is active]
        if switched:
            values = np.interp(switched, steps, [e[PREFIX + "tau"] for e in ours]).tolist()
            axes.plot(switched, values, marker, color=BLACK, markersize=8, markeredgecolor="white", label=label)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("τ (gain is τ²)", loc="left", fontsize=10)


def _panel(axes: Axes, name: str, ours: Log) -> None:
    title, lowest = PANELS[name]
    points = [(entry["step"], _value(entry, name)) for entry in ours]
    known = [(step, value) for step, value in points if value is not None]
    axes.plot(*zip(*known, strict=True), color=GREEN)
    axes.set_ylim(bottom=lowest)
    if name.endswith("_share"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(title, loc="left", fontsize=10)


def _weights(axes: Axes, counts: Tensor) -> None:
    used = counts.nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    edges = WEIGHT_EDGES[first : last + 1]
    axes.stairs((counts[first:last] / counts.sum()).tolist(), edges, fill=True, color=GREEN, alpha=0.6)
    axes.axvline(1, color=BLACK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("importance weight (1: as in a uniform batch)")
    axes.set_title("weights of the examples drawn (share, by the half octave)", loc="left", fontsize=10)


def _switches(log: Log) -> list[tuple[int, bool]]:
    """Give the steps at which it went on or off, as far as training logs tell: of several between two, the last."""
    found, before = [], False
    for entry in log:
        now = bool(entry.get(PREFIX + "active", before))
        if now is not before:
            found.append((entry.get(PREFIX + "switched_at", entry["step"]), now))
            before = now
    return found


def _spans(log: Log) -> list[tuple[int, int]]:
    """Give the steps from and to which it was on."""
    spans, since = [], None
    for step, on in _switches(log):
        if on:
            since = step
        elif since is not None:
            spans.append((since, step))
            since = None
    return spans if since is None else [*spans, (since, log[-1]["step"])]


def _summary(log: Log, ours: Log) -> str:
    # The end of the run, which counts the steps behind the last log too; a checkpoint has none.
    last = next((entry for entry in reversed(log) if PREFIX + "steps_on" in entry), ours[-1])
    on = last.get(PREFIX + "steps_on", sum(end - start for start, end in _spans(log)))
    switches = ours[-1][PREFIX + "switches"]
    return (
        f"On in {on / last['step']:.0%} of {last['step']:,} steps, {switches} switch{'' if switches == 1 else 'es'}; "
        f"compute {relative_compute(last):.2f} times that of uniform training"
    )
