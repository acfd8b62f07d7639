"""What JSON from a file must look like before anything is taken from it: a schema, and one error that names the field.

A schema is a :class:`Field`, or a dict of schemas: the names that a JSON object has, all of them and no others.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

# Up to here a float holds every integer, and so does JSON read by other languages.
LARGEST_INTEGER = 2**53


@dataclass(frozen=True)
class Field:
    """One value.

    Attributes:
        expected: What it must be, in words that continue "must be".
        accepts: Whether it is. It is called with anything that JSON can hold, and must not raise.
    """

    expected: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Nullable:
    """An object, or null."""

    schema: Mapping[str, Any]


@dataclass
class Nothing:
    """The state of what has none."""


Schema = Field | Nullable | Mapping[str, Any]


def integer(low: int, high: int = LARGEST_INTEGER) -> Field:
    """Give the field of an integer in ``[low, high]``; ``true`` and ``1.0`` are none."""
    return Field(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Field:
    """Give the field of a number in ``[low, high]``, so finite; integers are numbers too."""
    return Field(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and math.isfinite(_float(value)) and low <= value <= high,
    )


def choice(*values: str) -> Field:
    """Give the field of one of some strings."""
    return Field(f"one of {', '.join(map(repr, values))}", lambda value: isinstance(value, str) and value in values)


def optional(field: Field) -> Field:
    """Give the field of a value that may also be null."""
    return Field(f"{field.expected}, or null", lambda value: value is None or field.accepts(value))


FLAG = Field("true or false", lambda value: isinstance(value, bool))
COUNT = integer(0)


def listed(field: Field, length: int | None = None) -> Field:
    """Give the field of a list of such values, of any length or a given one."""
    many = "values" if length is None else f"{length} values"
    return Field(
        f"a list of {many}, each {field.expected}",
        lambda value: (
            isinstance(value, list) and length in (None, len(value)) and all(field.accepts(entry) for entry in value)
        ),
    )


# What a field of a dataclass must be where its annotation says no more.
PLAIN = {int: integer(-LARGEST_INTEGER), float: number(-1e300, 1e300), bool: FLAG}


def schema_of(kind: type) -> dict[str, Schema]:
    """Give the schema of a dataclass's ``asdict``, so that what is saved is described where it is kept.

    A field is a ``bool``, ``int`` or ``float``, a ``list`` of them, any of these or null, another such dataclass, or
    ``Annotated`` with the :class:`Field` that it must satisfy.

    >>> @dataclass
    ... class State:
    ...     on: bool = False
    >>> check({"on": 1}, schema_of(State), "state")
    Traceback (most recent call last):
    ValueError: state.on must be true or false, but it is 1.
    """
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _schema_of_hint(hints[field.name]) for field in fields(kind)}


def _schema_of_hint(hint: Any) -> Schema:
    described = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Field)]
    if described:
        return described[0]
    if is_dataclass(hint) and isinstance(hint, type):
        return schema_of(hint)
    if get_origin(hint) is list:
        inner = _schema_of_hint(get_args(hint)[0])
        assert isinstance(inner, Field)
        return listed(inner)
    if type(None) in get_args(hint):
        inner = _schema_of_hint(next(kind for kind in get_args(hint) if kind is not type(None)))
        return optional(inner) if isinstance(inner, Field) else Nullable(inner)  # pyrefly: ignore[bad-argument-type]
    if hint not in PLAIN:
        raise TypeError(f"A saved field must be a bool, int, float, a list of them, or Annotated, but it is {hint}.")
    return PLAIN[hint]


def from_state(kind: type, state: Any, name: str) -> Any:
    """Make a dataclass of what its ``asdict`` gave, after checking it field by field.

    Raises:
        ValueError: It is none; the message names the field, its value, and what it must be.
    """
    check(state, schema_of(kind), name)
    return _made(kind, state)


def _made(kind: type, state: Mapping[str, Any]) -> Any:
    inner = {name: _dataclass_in(hint) for name, hint in get_type_hints(kind).items()}
    return kind(**{n: _made(inner[n], v) if v is not None and inner[n] else v for n, v in state.items()})


def _dataclass_in(hint: Any) -> Any:
    return next((one for one in (hint, *get_args(hint)) if is_dataclass(one) and isinstance(one, type)), None)


def check(value: Any, schema: Schema, name: str) -> None:
    """Compare a value with its schema, before anything is taken from it.

    Args:
        value: Anything that ``json.loads`` can give.
        schema: What it must be.
        name: What the value is called in the error; fields of objects are appended with a dot.

    Raises:
        ValueError: The first field that is wrong, missing, or unknown, with its value, shortened.

    >>> check({"tau": 0.5}, {"tau": number(1, 10)}, "state")
    Traceback (most recent call last):
    ValueError: state.tau must be a number from 1 to 10, but it is 0.5.
    """
    if isinstance(schema, Nullable):
        if value is None:
            return
        schema = schema.schema
    if isinstance(schema, Field):
        if not schema.accepts(value):
            raise ValueError(f"{name} must be {schema.expected}, but it is {shortened(value)}.")
        return
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with {', '.join(schema)}, but it is {shortened(value)}.")
    for key in schema:
        if key not in value:
            raise ValueError(f"{name}.{key} is missing.")
        check(value[key], schema[key], f"{name}.{key}")
    for key in value:
        if key not in schema:
            raise ValueError(f"{name} has a field {shortened(key)} that is not known there.")


def shortened(value: Any) -> str:
    """Give a value for an error message, at most some 60 characters of it, however large or deep it is."""
    if type(value) is int and abs(value) > LARGEST_INTEGER:
        # Python refuses to print integers of more than 4300 digits.
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxstring, short.maxlong = 2, 2, 3, 40, 40
    text = short.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond 1.8e308
        return math.inf
