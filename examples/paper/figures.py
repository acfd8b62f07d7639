"""Colours, axes, the line below every figure that says how it was made, and the CSV files they are drawn from."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hf_importance.reporting import palette

BLACK, BLUE, SKY, GREEN = palette.BLACK, palette.BLUE, palette.SKY, palette.GREEN
ORANGE, PURPLE, RED = palette.ORANGE, palette.PURPLE, palette.VERMILLION


def provenance() -> str:
    """Say how the figures come about: command, commit, machine, versions."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    commit = found.stdout.strip() or "unknown"
    words = sys.argv[1:]
    for place, word in enumerate(words[:-1]):
        if word in ("--data", "--models", "--output"):  # folders of this machine
            words[place + 1] = f"path/to/{word[2:]}"
    command = " ".join(["python", f"examples/paper/{Path(sys.argv[0]).stem}.py", *words])
    if torch.accelerator.is_available():
        machine = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
        )
    else:
        machine = f"{os.cpu_count()} shared CPU cores, one used"
    return f"{command}; commit {commit}; {machine}; torch {torch.__version__}; transformers {transformers.__version__}"


def write(file: Path, rows: list[dict[str, Any]], made: str) -> None:
    """Write rows as CSV, below a line that says how they were made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="") as opened:
        opened.write(f"# {made}\n")
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})


def read(file: Path) -> tuple[list[dict[str, Any]], str]:
    """Read what :func:`write` has written; numbers as numbers."""
    with open(file) as opened:
        made = opened.readline().removeprefix("# ").strip()
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(opened)], made


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def new_figure(width: float, height: float, panels: int, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Give a figure with so many panels a row; ``options`` as ``Figure.subplots`` takes them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, panels, squeeze=False, **options).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    return figure, axes


def log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks that read as numbers: 0.02, not 2 x 10^-2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, file: Path, made: str, seeds: Iterable[int]) -> None:
    """Put below the figure how it was made, and save it."""
    command, *rest = made.split("; ")
    line = "; ".join([*rest, f"seeds {', '.join(str(seed) for seed in sorted(set(seeds)))}"])
    figure.supxlabel("\n".join([*textwrap.wrap(command, 150), line]), fontsize=6.5, color="0.4")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
