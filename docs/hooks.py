"""What mkdocs asks while it builds: the table of the arguments comes from their help, so it is written once."""

from dataclasses import MISSING, fields

from hf_importance import ImportanceArguments
from hf_importance.reporting.markdown import table

PLACE = "<!-- the arguments -->"


def arguments() -> str:
    """Give the table of the arguments."""
    rows = []
    for field in fields(ImportanceArguments):
        default = None if field.default is MISSING else field.default
        rows.append([f"`{field.name}`", f"`{default!r}`", field.metadata["help"]])
    return table(["argument", "default", ""], rows, text=3)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put it where a page asks for it."""
    return markdown.replace(PLACE, arguments())
