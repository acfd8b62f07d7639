"""What a model card says of importance sampling: the method, its arguments, τ's course, the compute, the paper."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_importance.reporting.report import PREFIX, relative_compute
from hf_importance.theory.costs import ASSUMED_KAPPA
from hf_importance.training_args import ImportanceArguments

TAG = "importance-sampling"
FIGURE = "importance_sampling.png"
INTRODUCTION = """\
Trained with `ImportanceTrainer` of hf_importance. A step by importance draws the examples with the larger gradients
more often (by the norm of the loss's gradient at the logits) and weighs each with the inverse of its probability, so
that the gradient stays unbiased. It is off, and the run a plain `Trainer`'s, until τ says that it is worth its cost:
at τ a uniform batch would have to be τ² times as large for the same gradient noise."""
CITATION = """\
### Citation

```bibtex
@inproceedings{katharopoulos2018importance,
  title = {Not All Samples Are Created Equal: Deep Learning with Importance Sampling},
  author = {Katharopoulos, Angelos and Fleuret, Fran{\\c{c}}ois},
  booktitle = {International Conference on Machine Learning},
  year = {2018},
  url = {https://arxiv.org/abs/1803.00942}
}
```"""


def extend_card(
    folder: str | Path,
    arguments: ImportanceArguments,
    log: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, float] | None = None,
) -> None:
    """Put a section about importance sampling, and a tag, into the model card that the Trainer wrote.

    The figure of the run goes beside it as ``importance_sampling.png`` where matplotlib is installed.

    Args:
        folder: Where ``README.md`` is.
        arguments: What the run was started with.
        log: Its ``log_history``.
        baseline: Metrics of a uniform run of the same script, by the names of the last evaluation (``eval_accuracy``).
    """
    file = Path(folder) / "README.md"
    card = ModelCard.load(file)
    if not card.data.base_model:  # the Trainer's: '' for a model that was made from a config, not loaded
        card.data.base_model = None
    tags = card.data.tags or []
    card.data.tags = [*tags, *({TAG} - set(tags))]
    figure = None
    if any("loss" in entry for entry in log) and importlib.util.find_spec("matplotlib"):
        from hf_importance.reporting.plots import plot_training

        plot_training(log, Path(folder) / FIGURE)
        figure = FIGURE
    card.text = f"{card.text.rstrip()}\n\n{importance_section(arguments, log, figure, baseline)}\n"
    card.save(file)


def importance_section(
    arguments: ImportanceArguments,
    log: Sequence[Mapping[str, Any]],
    figure: str | None = None,
    baseline: Mapping[str, float] | None = None,
) -> str:
    """Write the section, in Markdown.

    Args:
        arguments: What the run was started with.
        log: Its ``log_history``; of a run that has not begun, empty.
        figure: Where the figure of the run lies, as seen from the card; τ's course is a table without it.
        baseline: As in :func:`extend_card`.
    """
    parts = ["## Importance sampling", INTRODUCTION]
    ours = [entry for entry in log if PREFIX + "tau" in entry and "loss" in entry]
    if ours:
        # The end of the run, which counts the steps behind the last log too; a checkpoint has none.
        last = next((entry for entry in reversed(log) if PREFIX + "steps_on" in entry), ours[-1])
        parts += ["### Compute", _compute(last), "### The course of τ", _course(ours, figure)]
    if baseline:
        parts += ["### Results", _results(log, baseline)]
    settings = [(f"`{field.name}`", f"`{getattr(arguments, field.name)}`") for field in fields(ImportanceArguments)]
    parts += ["### Arguments", _table(("argument", "value"), settings), CITATION]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _compute(last: Mapping[str, Any]) -> str:
    scored, trained, saved = (last[f"{PREFIX}examples_{name}"] for name in ("scored", "trained", "saved"))
    kappa = last.get(PREFIX + "kappa", ASSUMED_KAPPA)
    rows = [
        ("optimizer steps", f"{last['step']:,}", f"{last['step']:,}"),
        ("of them drawn by importance", f"{last[PREFIX + 'steps_on']:,}" if PREFIX + "steps_on" in last else "-", "0"),
        ("examples trained on", f"{trained:,}", f"{trained + saved:,}"),
        ("examples scored by a forward pass of their own", f"{scored:,}", "0"),
        (f"compute (scoring an example is {kappa:.2g} of training on it)", f"{relative_compute(last):.2f}", "1"),
    ]
    return _table(("", "this run", "uniform, as many steps"), rows)


def _course(ours: Sequence[Mapping[str, Any]], figure: str | None) -> str:
    if figure is not None:
        return f"![Loss, τ with its threshold and switches, gain and weights against the optimizer step]({figure})"
    # Ten points at most, the last among them.
    some = ours[::-1][:: max(1, len(ours) // 10)][::-1]
    rows = [(f"{e['step']:,}", f"{e[PREFIX + 'tau']:.2f}", "on" if e[PREFIX + "active"] else "off") for e in some]
    return _table(("step", "τ", "importance sampling"), rows)


def _results(log: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> str:
    found = {name: value for entry in log for name, value in entry.items() if name in baseline}
    rows = [(f"`{name}`", f"{found[name]:.4g}", f"{baseline[name]:.4g}") for name in baseline if name in found]
    return _table(("", "this run", "uniform baseline"), rows)
