"""Tables in Markdown: of a model card, of the pages in ``docs/``, and what the scripts in ``examples/`` print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], text: int = 1) -> str:
    """Give a table without a line break at its end.

    Args:
        head: Names of the columns.
        rows: Cells of each line, as many as ``head`` has.
        text: So many columns from the left are text; the others are numbers, and are set flush right.

    Raises:
        ValueError: A line has more cells than the head, or fewer.

    >>> print(table(["side", "loss"], [["plain", 0.5]]))
    | side | loss |
    |---|--:|
    | plain | 0.5 |
    """
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    for line in lines:
        if len(line) != len(head):
            raise ValueError(f"A line has {len(line)} cells and the head {len(head)}: {line}.")
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + "---|" * text + "--:|" * (len(head) - text), *rest])
