"""Table and figure of the parts that ``gpu.py`` has left in a folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_importance.reporting import markdown, palette
from hf_importance.reporting.spread import mean_and_spread

COLORS = {"off": palette.PLAIN, "3b to b": palette.OURS, "2b to b/2": palette.GREEN}
Parts = dict[str, dict]


def ranged(values: list[float], digits: int = 3) -> str:
    """Write median, smallest and largest."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def whole(value: float | None) -> str:
    """Write a number of MiB."""
    return "–" if value is None else f"{value:,.0f}"


def grid(head: str, rows: Iterator[list[str]]) -> list[str]:
    """Write a table, of whose columns the first is text; nothing where there are no rows."""
    lines = list(rows)
    return [markdown.table(head.split(" | "), lines), ""] if lines else []


def named(parts: Parts, measure: str) -> Iterator[tuple[str, dict]]:
    """Give the rest of the name, and what was found, of the parts of one measure."""
    for name, found in parts.items():
        if name.startswith(f"{measure}-"):
            yield name.removeprefix(f"{measure}-"), found


def steps(parts: Parts) -> Iterator[list[str]]:
    """Write a row a model: the times of steps, and what 1 + 3κ of its own bf16 κ predicts."""
    for model, found in named(parts, "step"):
        kappa = parts.get(f"kappa-{model}-bf16")
        ratios = [ranged(found["over plain"][kind]) for kind in COLORS]
        ratios.insert(2, "–" if kappa is None else f"{1 + 3 * kappa['kappa'][0]:.3f}")
        yield [model, f"{found['batch']}", ranged(found["ms"]["plain"], 1), *ratios, str(found["rounds"])]


def memory(parts: Parts) -> Iterator[list[str]]:
    """Write a row a model: peaks of the device's memory."""
    kinds = ("plain", "off", "3b to b", "3b to b, scoring", "2b to b/2", "2b to b/2, scoring")
    for model, found in named(parts, "step"):
        yield [model, *(whole(found["peak MiB"][kind]) for kind in kinds)]


def kappas(parts: Parts) -> Iterator[list[str]]:
    """Write a row a model and precision."""
    for name, found in named(parts, "kappa"):
        own = "–" if found["own kappa"] is None else f"{found['own kappa']:.3f}"
        times = [ranged(found[f"ms to {verb}"]) for verb in ("score", "train")]
        yield [name.replace("-", ", "), *times, ranged(found["kappa"]), own]


def alphas(parts: Parts) -> Iterator[list[str]]:
    """Write a row a model."""
    for model, found in named(parts, "alpha"):
        sizes = ", ".join(f"{size}: {values[0]:.1f}" for size, values in found["ms"].items())
        yield [model, sizes, ranged(found["alpha"])]


def waits(parts: Parts) -> Iterator[list[str]]:
    """Write a row a model and kind of call."""
    for model, found in named(parts, "waits"):
        kinds = found["a step"]
        for call in kinds["plain"]:
            if any(counts[call] for counts in kinds.values()):
                yield [f"{model}, `{call}`", *(f"{kinds[kind][call]:.2f}" for kind in ("plain", "off", "on"))]


def collectives(parts: Parts) -> Iterator[list[str]]:
    """Write a row a number of processes and phase."""
    for world, runs in parts.get("collective", {}).get("processes", {}).items():
        for phase in ("off", "on"):
            rows = [run[phase] for run in runs]
            took, within = (statistics.median(row[key] for row in rows) for key in ("step", "collective"))
            yield [f"{world}, {phase}", f"{1000 * took:.1f}", f"{1000 * within:.2f}", f"{100 * within / took:.2f} %"]


def fine_tunings(parts: Parts) -> Iterator[list[str]]:
    """Write a row a task and side: mean and standard deviation over the seeds."""
    tasks: dict[str, list[dict]] = {}
    for name, found in named(parts, "finetune"):
        tasks.setdefault(name.rpartition("-")[0], []).append(found)
    for task, seeds in tasks.items():
        for side in ("plain", "auto method"):
            keys = ("test error", "train loss", "compute", "seconds")
            cells = (mean_and_spread([found[side][key] for found in seeds]) for key in keys)
            yield [f"{task}, {side}", str(len(seeds)), *cells]


def table(parts: Parts, left_out: dict[str, str], failed: list[str]) -> str:
    """Write all tables, and what is not in them, with the reasons."""
    machine = "{device}, torch {torch}, transformers {transformers}, commit {commit}"
    lines = [*sorted({machine.format(**part) for part in parts.values()}), "Median, smallest and largest.", ""]
    if any(part["quick"] for part in parts.values()):
        lines = ["`--quick`: tiny models. It shows that every part works, and no figure means anything.", "", *lines]
    for head, rows in (
        ("steps | batch | plain, ms | off / plain | 3b to b / plain | 1 + 3κ | 2b to b/2 / plain | rounds", steps),
        ("peak MiB | plain | off | 3b to b | scoring alone | 2b to b/2 | scoring alone", memory),
        ("one example | ms to score | ms to train | κ | the run's own κ", kappas),
        ("fixed share | ms by batch size | α", alphas),
        ("waits a step | plain | off | on", waits),
        ("processes | step, ms | in the collective, ms | share", collectives),
        ("fine-tuning | seeds | test error | training loss | compute | seconds", fine_tunings),
    ):
        lines += grid(head, rows(parts))
    reasons = {**left_out, **dict.fromkeys(failed, "it failed")}
    lines += [f"- not measured: {name}, {reason}" for name, reason in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def _bars(axes: Axes, values: list[list[float]], places: list[float], color: str, label: str) -> None:
    """Draw medians with their ranges."""
    middle = [value[0] for value in values]
    errors = [[value[0] - value[1] for value in values], [value[2] - value[0] for value in values]]
    axes.errorbar(middle, places, xerr=errors, fmt="o", color=color, label=label, markersize=5, elinewidth=1.2)


def draw(parts: Parts, file: Path) -> None:
    """Draw step times over plain, κ, and what small batches take."""
    picture = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    found = dict(named(parts, "step"))
    for number, (kind, color) in enumerate(COLORS.items()):
        places = [place + 0.2 * (number - 1) for place in range(len(found))]
        _bars(left, [step["over plain"][kind] for step in found.values()], places, color, kind)
    left.axvline(1, color="0.6", linewidth=1, zorder=0)
    left.set(xlabel="step time / plain", yticks=range(len(found)), yticklabels=list(found))
    kappas = {name.replace("-", ", "): part["kappa"] for name, part in named(parts, "kappa")}
    _bars(middle, list(kappas.values()), list(range(len(kappas))), palette.BLUE, "")
    middle.set(xlabel="κ, scoring over training", yticks=range(len(kappas)), yticklabels=list(kappas))
    middle.axvline(1 / 3, color="0.6", linewidth=1, zorder=0)
    for model, part in named(parts, "alpha"):
        sizes = [int(size) for size in part["ms"]]
        times = [values[0] for values in part["ms"].values()]
        shares = [size / max(sizes) for size in sizes]
        right.plot(shares, [value / times[-1] for value in times], "o-", label=f"{model}, α {part['alpha'][0]:.2f}")
    right.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
    right.set(xlabel="share of the batch", ylabel="share of the time", xlim=(0, 1.05), ylim=(0, None))
    for axes in (left, middle):
        axes.invert_yaxis()
    for axes in picture.axes:
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1] and axes is not middle:
            axes.legend(frameon=False)
    picture.savefig(file, dpi=150)


def report(out: Path, quick: bool, order: list[str], left_out: dict[str, str], failed: list[str]) -> str:
    """Write ``table.md`` and ``figure.png``, and give the table.

    Args:
        out: Folder of the parts.
        quick: Which of the two kinds of parts.
        order: Names of all parts.
        left_out: Reasons for those that were left out.
        failed: Those that failed.
    """
    files = [out / f"{name}.json" for name in order]
    parts = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    parts = {name: found for name, found in parts.items() if found["quick"] == quick}
    text = table(parts, left_out, failed)
    (out / "table.md").write_text(text)
    draw(parts, out / "figure.png")
    return text
