"""Values that a user gave, checked in words that name the argument, the value, and what to pass."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse what is none of the known words.

    Raises:
        ValueError: It is none.
    """
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float,
    meaning: str,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse what is no finite number between two bounds, or on them where they are not open.

    Raises:
        ValueError: It is none.

    >>> check_range("share", 0, 0, 1, "0.1 is the default.", open_low=True)
    Traceback (most recent call last):
    ValueError: share must be a number in (0, 1], but it is 0. 0.1 is the default.
    """
    fine = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not fine or (open_low and value == low) or (open_high and value == high):
        between = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        above = f"a finite number {'above' if open_low else 'of at least'} {low}"
        expected = above if high == math.inf else f"a number in {between}"
        raise ValueError(f"{name} must be {expected}, but it is {value!r}. {meaning}")
