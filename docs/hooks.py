"""What mkdocs asks while it builds: the table of the arguments comes from their help, so it is written once."""

from dataclasses import MISSING, fields

from hf_importance import ImportanceArguments

PLACE = "<!-- the arguments -->"


def arguments() -> str:
    """Give the table of the arguments."""
    lines = ["| argument | default | |", "|---|---|---|"]
    for field in fields(ImportanceArguments):
        default = None if field.default is MISSING else field.default
        lines.append(f"| `{field.name}` | `{default!r}` | {field.metadata['help']} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put it where a page asks for it."""
    return markdown.replace(PLACE, arguments())
