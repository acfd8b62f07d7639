"""Write docs/reference.md from the docstrings and the arguments' help: ``python docs/make_reference.py``.

The test suite compares the page with what this gives, so it cannot fall behind the code.
"""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

import hf_importance
from hf_importance import ImportanceArguments
from hf_importance.plots import plot_training

PAGE = Path(__file__).with_name("reference.md")
METHODS = {"ImportanceMixin": ("importance_table", "create_model_card")}


def signature(name: str, thing: object) -> str:
    """Give the call of a function, or the name of a class: what these take, their docstrings say."""
    if not inspect.isfunction(thing):
        return f"class {name}"
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
    for name, thing in vars(hf_importance).items():
        if inspect.isclass(thing) or inspect.isfunction(thing):
            lines += section(2, name, thing)
            for method in METHODS.get(name, ()):
                lines += section(3, f"{name}.{method}", getattr(thing, method))
    lines += section(2, "hf_importance.plots.plot_training", plot_training)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
