"""Tables in Markdown: of a model card, of the pages in ``docs/``, and what the scripts in ``examples/`` print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


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
    return "\n".join(lines(head, rows, text))


def lines(head: Sequence[str], rows: Iterable[Sequence[object]] = (), text: int = 1) -> Iterator[str]:
    """Give the lines of :func:`table`, each as soon as its row is there; of no rows those of the head."""
    yield line(head)
    yield "|" + "---|" * text + "--:|" * (len(head) - text)
    for cells in rows:
        if len(cells) != len(head):
            raise ValueError(f"A line has {len(cells)} cells and the head {len(head)}: {list(map(str, cells))}.")
        yield line(cells)


def line(cells: Iterable[object]) -> str:
    """Give one line of a table, where rows come from callbacks."""
    return f"| {' | '.join(map(str, cells))} |"
