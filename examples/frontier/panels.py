"""The figure: test error against compute, a panel a task."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from learners import TASKS
from tables import Row, plain_curve, points

from hf_importance.reporting import palette

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = {
    "presample": palette.ORANGE,
    "k=1/2": palette.GREEN,
    "history": palette.SKY,
    "auto": palette.OURS,
    "InfoBatch": palette.PURPLE,
}
SHAPES = {0.0: "s", 1 / 3: "o", 0.17: "^"}


def draw(rows: list[Row], file: Path) -> None:
    """Draw error against compute, a panel a task: plain as a curve with one standard error, ours as points."""
    found = points(rows)
    tasks = [task for task in TASKS if plain_curve(found, task) and not TASKS[task].afterwards]
    across = min(len(tasks), 3)
    figure, panels = plt.subplots(
        -(-len(tasks) // across), across, figsize=(3.6 * across, 3.2 * -(-len(tasks) // across)), squeeze=False
    )
    for panel, task in zip(panels.flat, tasks, strict=False):
        curve = plain_curve(found, task)
        at, mean, deviation = (
            np.array(values)
            for values in zip(
                *((p.mean("compute"), 100 * p.mean("test_error"), 100 * p.error_of_mean("test_error")) for p in curve),
                strict=True,
            )
        )
        panel.plot(at, mean, ".-", color=palette.PLAIN, label="plain")
        panel.fill_between(at, mean - deviation, mean + deviation, color=palette.PLAIN, alpha=0.15, linewidth=0)
        for point in found:
            if point.task == task and point.side in SHOWN and point.kappa in SHAPES:
                name = f"{point.side}, κ {point.kappa:.2f}" if point.kappa else point.side
                error = 100 * point.error_of_mean("test_error")
                style = {"color": SHOWN[point.side], "fmt": SHAPES[point.kappa], "markersize": 5, "capsize": 2}
                panel.errorbar(
                    point.mean("compute"), 100 * point.mean("test_error"), error, label=name, elinewidth=1, **style
                )
        panel.set_xscale("log")
        panel.set_xticks(at, [f"{value:g}" for value in at.round(2)], minor=False)
        panel.minorticks_off()
        panel.set_title(task, fontsize=10)
    for panel in panels.flat[len(tasks) :]:
        panel.axis("off")
    for panel in panels[-1]:
        panel.set_xlabel("compute, in base runs", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("test error, %", fontsize=9)
    known = {}
    for panel in panels.flat[: len(tasks)]:
        handles, names = panel.get_legend_handles_labels()
        known |= dict(zip(names, handles, strict=True))
    figure.legend(known.values(), known, loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
