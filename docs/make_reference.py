"""Write docs/reference.md from the docstrings and the arguments' help: ``python docs/make_reference.py``.

The test suite compares the page with what this gives, so it cannot fall behind the code.
"""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import hf_importance
from hf_importance import ImportanceArguments
from hf_importance.reporting.plots import plot_training

PAGE = Path(__file__).with_name("reference.md")
# What a reader adopts, then what is chosen from, then what a method of one's own is made of, then the functions.
ORDER = (
    *("ImportanceTrainer", "ImportanceMixin", "ImportanceTrainingArguments", "ImportanceArguments"),
    *("Presample", "History", "Auto", "Observe"),
    *("Sampler", "Visits", "Pool", "Scored", "Facts"),
    *("upper_bound", "estimate_tau", "resample"),
)
METHODS = {
    "ImportanceMixin": ("importance_table", "importance_weights", "create_model_card"),
    "Presample": ("paper",),
    "Sampler": ("begin", "visits", "pool", "keep", "measure", "learn"),
}


def signature(name: str, thing: object) -> str:
    """Give the call of a function; of a class its name, and where it is a sampler what it takes, with the defaults."""
    if inspect.isclass(thing):
        given = fields(thing) if issubclass(thing, hf_importance.Sampler) and is_dataclass(thing) else ()
        defaults = ", ".join(f"{f.name}={f.default!r}" for f in given if f.default is not MISSING)
        return f"class {name}({defaults})" if defaults else f"class {name}"
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return f"{name}({ast.unparse(defined.args)}) -> {ast.unparse(defined.returns)}"


def section(level: int, name: str, thing: object) -> list[str]:
    """Give the heading, the call and the docstring of one public thing."""
    return [f"{'#' * level} `{name}`", "", "```text", signature(name, thing), "", inspect.getdoc(thing), "```", ""]


def arguments() -> list[str]:
    """Give the table of the arguments."""
    lines = ["| argument | default | |", "|---|---|---|"]
    for field in fields(ImportanceArguments):
        default = None if field.default is MISSING else field.default
        lines.append(f"| `{field.name}` | `{default!r}` | {field.metadata['help']} |")
    return [*lines, ""]


def page() -> str:
    """Give the whole page."""
    lines = [
        "# Reference",
        "",
        "Made of the docstrings by `python docs/make_reference.py`; not edited by hand.",
        "",
        "## Arguments",
        "",
        "Fields of `ImportanceArguments`, and so of `ImportanceTrainingArguments`.",
        "",
        *arguments(),
    ]
    public = {name: thing for name, thing in vars(hf_importance).items() if callable(thing)}
    assert sorted(public) == sorted(ORDER), sorted(set(public) ^ set(ORDER))
    for name in ORDER:
        lines += section(2, name, public[name])
        for method in METHODS.get(name, ()):
            lines += section(3, f"{name}.{method}", getattr(public[name], method))
    lines += section(2, "hf_importance.reporting.plots.plot_training", plot_training)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
