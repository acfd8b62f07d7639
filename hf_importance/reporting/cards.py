"""What a model card says of importance sampling: how the run went, the compute, the arguments, the paper."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers.modelcard import TASK_MAPPING

from hf_importance.reporting.markdown import table
from hf_importance.reporting.report import PREFIX, evaluated, outcome, relative_compute
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
    model_class: str = "",
) -> None:
    """Put a section about importance sampling, a tag, and results into the model card that the Trainer wrote.

    The figure of the run goes beside it as ``importance_sampling.png`` where matplotlib is installed. Results are what
    the last evaluation found; the Trainer writes them only where it knows a dataset of the Hub.

    Args:
        folder: Where ``README.md`` is.
        arguments: What the run was started with.
        log: Its ``log_history``.
        baseline: Metrics of a uniform run of the same script, by the names of the last evaluation (``eval_accuracy``).
        model_class: Name of the model's class, which tells the task.
    """
    file = Path(folder) / "README.md"
    card = ModelCard.load(file)
    if not card.data.base_model:  # the Trainer's: '' for a model that was made from a config, not loaded
        card.data.base_model = None
    tags = card.data.tags or []
    card.data.tags = [*tags, *({TAG} - set(tags))]
    if not card.data.eval_results:
        card.data.eval_results = _eval_results(log, model_class, card.data.datasets) or None
        card.data.model_name = card.data.model_name or Path(folder).resolve().name
    figure = None
    if any("loss" in entry for entry in log) and importlib.util.find_spec("matplotlib"):
        from hf_importance.reporting.plots import plot_training

        plot_training(log, Path(folder) / FIGURE)
        figure = FIGURE
    card.text = f"{card.text.rstrip()}\n\n{importance_section(arguments, log, figure, baseline)}\n"
    card.save(file)


def _eval_results(log: Sequence[Mapping[str, Any]], model_class: str, datasets: Any) -> list[EvalResult]:
    """Give what the last evaluation found, as the Hub wants it; nothing where the task is not known."""
    task = next((task for task, names in TASK_MAPPING.items() if model_class in names.values()), None)
    found = next((evaluated(entry) for entry in reversed(log) if evaluated(entry)), {})
    name = next(iter([datasets] if isinstance(datasets, str) else datasets or []), "unknown")
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            metric_type=metric.removeprefix("eval_"),
            metric_name=metric.removeprefix("eval_").replace("_", " "),
            metric_value=value,
        )
        for metric, value in found.items()
        if task is not None
    ]


def importance_section(
    arguments: ImportanceArguments,
    log: Sequence[Mapping[str, Any]],
    figure: str | None = None,
    baseline: Mapping[str, float] | None = None,
) -> str:
    """Write the section, in Markdown.

    Args:
        arguments: What the run was started with; those that were left at their defaults are not listed.
        log: Its ``log_history``; of a run that has not begun, empty.
        figure: Where the figure of the run lies, as seen from the card; its course is a table without it.
        baseline: As in :func:`extend_card`.
    """
    parts = ["## Importance sampling", INTRODUCTION]
    ours = [entry for entry in log if PREFIX + "tau" in entry and "loss" in entry]
    end = next((entry for entry in reversed(log) if PREFIX + "largest_tau" in entry), None)
    if end is not None:
        parts += [f"**{outcome(end, end['step'])}**", _compute(end)]
    if ours:
        parts += [_course(ours, figure)]
    if baseline:
        parts += ["### Results", _results(log, baseline)]
    parts += ["### Arguments", _arguments(arguments), CITATION]
    return "\n\n".join(parts)


def _arguments(arguments: ImportanceArguments) -> str:
    """List what is not the default."""
    values = ((field.name, getattr(arguments, field.name), field.default) for field in fields(ImportanceArguments))
    rows = [(f"`{name}`", f"`{value}`") for name, value, default in values if value != default]
    own = table(("argument", "value"), rows, text=2) if rows else "All at their defaults."
    try:
        return f"{own}\n\nhf_importance {version('hf_importance')}"
    except PackageNotFoundError:  # it was never installed, but lies on the path
        return own


def _compute(end: Mapping[str, Any]) -> str:
    scored, trained, saved, on = (
        end[PREFIX + name] for name in ("examples_scored", "examples_trained", "examples_saved", "steps_on")
    )
    kappa = end.get(PREFIX + "kappa", ASSUMED_KAPPA)
    rows = [
        ("optimizer steps", f"{end['step']:,}", f"{end['step']:,}"),
        ("of them drawn by importance", f"{on:,}", "0"),
        ("examples trained on", f"{trained:,}", f"{trained + saved:,}"),
        ("examples scored by a forward pass of their own", f"{scored:,}", "0"),
        (f"compute (scoring an example is {kappa:.2g} of training on it)", f"{relative_compute(end):.2f}", "1"),
    ]
    return table(("", "this run", "uniform, as many steps"), rows)


def _course(ours: Sequence[Mapping[str, Any]], figure: str | None) -> str:
    if figure is not None:
        return f"![Loss, cost of a step by importance with its break-even line, and examples saved]({figure})"
    # Ten points at most, the last among them.
    some = ours[::-1][:: max(1, len(ours) // 10)][::-1]
    rows = [(f"{e['step']:,}", f"{e[PREFIX + 'tau']:.2f}", "on" if e[PREFIX + "active"] else "off") for e in some]
    return table(("step", "τ", "importance sampling"), rows, text=0)


def _results(log: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> str:
    found = {name: value for entry in log for name, value in entry.items() if name in baseline}
    rows = [(f"`{name}`", f"{found[name]:.4g}", f"{baseline[name]:.4g}") for name in baseline if name in found]
    return table(("", "this run", "uniform baseline"), rows)
