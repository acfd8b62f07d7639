"""The figure of a run: loss and metric, what importance sampling costs, and what it saved, against the optimizer step.

Needs matplotlib: ``pip install 'hf_importance[plots]'``.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer

from hf_importance.reporting.palette import BLACK, BLUE, GREEN, VERMILLION
from hf_importance.reporting.report import PREFIX, WEIGHT_EDGES, evaluated, outcome

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

ON = {"color": VERMILLION, "alpha": 0.10, "linewidth": 0}
STATE = "trainer_state.json"
# With detail, where the log has the key: title with its unit.
DETAILS = {
    "tau": "τ (a uniform batch τ² times as large has the same noise)",
    "gain": "measured gain (uniform batches that one is worth)",
    "effective_sample_size": "effective sample size (examples of a micro-batch)",
    "max_weight": "largest weight (times a uniform example's)",
    "skipped_share": "examples skipped (share)",
    "table_age": "age of the remembered scores (steps)",
}


def plot_training(source: Trainer | Log | str | Path, file: str | Path | None = None, detail: bool = False) -> Figure:
    """Draw what importance sampling did in one run. What the log does not hold is left out.

    Args:
        source: A trainer, its ``state.log_history``, or a folder: a checkpoint, or an output folder that holds some.
        file: Where to save the figure too; its suffix says how.
        detail: Whether τ, the gain, and the weights are drawn too; most of it needs ``importance_log="all"``.

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
    priced = any(PREFIX + "relative_cost" in entry for entry in ours)
    wide = [_loss, *([_cost if priced else _tau] if ours else [])]
    if any(value for _, value in _points(log, "examples_saved")):
        wide.append(_saved)
    names = [name for name in DETAILS if detail and _points(ours, name) and (priced or name != "tau")]
    counts = source.importance_weights() if detail and hasattr(source, "importance_weights") else None
    histogram = counts is not None and int(counts.sum()) > 0
    small = (len(names) + 1) // 2
    rows = len(wide) + small + histogram
    figure = Figure(figsize=(9, 0.9 + 2.1 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    every: list[Axes] = []
    for row, draw in enumerate(wide):
        axes = figure.add_subplot(grid[row, :], sharex=every[0] if every else None)
        draw(axes, log, ours)
        every.append(axes)
    for number, name in enumerate(names):
        columns = slice(None) if number == len(names) - 1 and number % 2 == 0 else number % 2
        axes = figure.add_subplot(grid[len(wide) + number // 2, columns], sharex=every[0])
        _tau(axes, log, ours) if name == "tau" else _detail(axes, name, ours)
        every.append(axes)
    spans = _spans(log)
    for axes in every:
        _against_steps(axes, spans, last=axes.get_subplotspec().rowspan.stop == rows - histogram)
    every[0].set_xlim(0, log[-1]["step"] * 1.01)
    if histogram:
        _weights(figure.add_subplot(grid[-1, :]), counts)
    if ours:
        figure.suptitle("\n".join(textwrap.wrap(_summary(log, ours), 110)), x=0.01, ha="left", fontsize=10)
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure


# ---- The log ----


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


def _points(log: Log, name: str, prefix: str = PREFIX) -> list[tuple[int, float]]:
    return [(entry["step"], entry[prefix + name]) for entry in log if prefix + name in entry]


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
    end = next((entry for entry in reversed(log) if PREFIX + "largest_tau" in entry), None)
    if end is not None:
        return outcome(end, end["step"])
    on, steps = sum(end - start for start, end in _spans(log)), log[-1]["step"]
    return f"So far on in {on / steps:.0%} of {steps:,} steps; largest τ {max(e[PREFIX + 'tau'] for e in ours):.1f}"


# ---- The panels ----


def _loss(axes: Axes, log: Log, ours: Log) -> None:
    axes.plot(*zip(*_points(log, "loss", ""), strict=True), color=BLUE, label="training loss")
    if found := _points(log, "eval_loss", ""):
        axes.plot(*zip(*found, strict=True), "o-", color=BLACK, markersize=4, linewidth=1, label="evaluation loss")
    lines = axes.get_lines()
    if min(float(np.min(line.get_ydata())) for line in lines) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    handles = [*lines]
    metric = next((name for entry in log for name in evaluated(entry) if name != "eval_loss"), None)
    if metric is not None:
        right = axes.twinx()
        right.plot(*zip(*_points(log, metric, ""), strict=True), "s--", color=GREEN, markersize=4, linewidth=1)
        right.lines[0].set_label(metric.removeprefix("eval_").replace("_", " ") + " (right)")
        right.spines[["top", "left"]].set_visible(False)
        handles += right.get_lines()
    on = [Patch(label="importance sampling on", **ON)] if _spans(log) else []
    # Above the panel: within it, it would lie on the curves.
    axes.legend(handles=[*handles, *on], frameon=False, fontsize=9, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))


def _cost(axes: Axes, log: Log, ours: Log) -> None:
    points = _points(ours, "relative_cost")
    axes.plot(*zip(*points, strict=True), color=VERMILLION)
    axes.axhline(1, color=BLACK, linewidth=1, linestyle=":")
    axes.set_ylim(0, max(1.1, 1.05 * max(value for _, value in points)))
    axes.annotate("break-even", (0.005, 1), xycoords=axes.get_yaxis_transform(), va="bottom", fontsize=9)
    axes.set_title("cost of a step by importance at equal noise (a uniform step: 1)", loc="left", fontsize=10)


def _saved(axes: Axes, log: Log, ours: Log) -> None:
    points = _points(log, "examples_saved")
    steps, values = zip(*points, strict=True)
    axes.fill_between(steps, values, color=GREEN, alpha=0.3, linewidth=0)
    axes.plot(steps, values, color=GREEN)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("examples saved (that uniform steps would have trained on)", loc="left", fontsize=10)


def _tau(axes: Axes, log: Log, ours: Log) -> None:
    steps, values = zip(*_points(ours, "tau"), strict=True)
    axes.plot(steps, values, color=VERMILLION, label="τ")
    if threshold := _points(ours, "tau_threshold"):  # other methods do not go by one
        axes.plot(*zip(*threshold, strict=True), color=BLACK, linestyle=":", label="threshold")
    for active, marker, label in ((True, "^", "goes on"), (False, "v", "goes off")):
        if switched := [step for step, on in _switches(log) if on is active]:
            at = np.interp(switched, steps, values).tolist()
            axes.plot(switched, at, marker, color=BLACK, markersize=8, markeredgecolor="white", label=label)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(DETAILS["tau"], loc="left", fontsize=10)


def _detail(axes: Axes, name: str, ours: Log) -> None:
    axes.plot(*zip(*_points(ours, name), strict=True), color=GREEN)
    if name == "max_weight":  # a single one may be a hundred times the others
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    if name.endswith("_share"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(DETAILS[name], loc="left", fontsize=10)


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
