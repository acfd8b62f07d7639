"""The pool of one step: the Trainer's own batch and batches of the reserve, and the rows that are kept of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, TOKEN_ENTRIES, WEIGHTS, batch_size_of, first_of
from hf_importance.transfer import to_device


@dataclass(frozen=True)
class Padding:
    """How rows that were padded to different lengths become one batch.

    Attributes:
        side: ``"left"`` or ``"right"``.
        multiple: Of which lengths are a multiple.
        values: What a batch entry is padded with, by its name. Others get 0: a mask is off there.
        unread_first: Labels that a causal language model shifts: what stands first in a row is predicted from nothing
            and never read. With padding put in front of it, it would be.
    """

    side: str = "right"
    multiple: int = 1
    unread_first: frozenset[str] = frozenset()
    values: Mapping[str, float] = field(default_factory=lambda: {"labels": IGNORED_LABEL})


class Rows(NamedTuple):
    """Which rows of a batch; int64, shape ``(n,)``."""

    host: Tensor  # on the CPU
    there: Tensor  # on the device of the batch


def merge_rows(batches: Sequence[Any], rows: Sequence[Tensor] | Sequence[slice], padding: Padding) -> Any:
    """Gather the given rows of several batches into one batch, padded to the longest of them.

    Rows are taken on the device where the batches lie, and only they are copied; a slice of one batch is a view. What
    is no tensor of the batch's length, no array and no list of it is taken from the first batch.

    Args:
        batches: Batches with the same entries, each of any number of rows.
        rows: For each batch, the rows to take, in order: int64, on the CPU, of any length, or a slice that is not
            empty.
        padding: How entries of different lengths are brought together.
    """
    found: list[Any] = list(rows)
    if not isinstance(found[0], slice):
        there = to_device(torch.cat(found), first_of(batches[0]).device)  # one copy for all
        found = [Rows(*both) for both in zip(found, there.split([len(row) for row in found]), strict=True)]
    return _merge(batches, found, [batch_size_of(batch) for batch in batches], padding, name="")


def _merge(
    values: Sequence[Any], rows: Sequence[Rows | slice], sizes: Sequence[int], padding: Padding, name: str
) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _merge([value[key] for value in values], rows, sizes, padding, key) for key in first}
    several = isinstance(first, list | tuple)
    if not several and not all(isinstance(value, Tensor | np.ndarray) and value.ndim > 0 for value in values):
        return first
    by_rows = all(len(value) == size for value, size in zip(values, sizes, strict=True))
    if several and not (by_rows and not any(isinstance(entry, Tensor) for entry in first)):
        return type(first)(_merge(list(entries), rows, sizes, padding, name) for entries in zip(*values, strict=True))
    if not by_rows:
        return first
    taken = [_taken(v, row) for v, row in zip(values, rows, strict=True) if isinstance(row, slice) or len(row.host)]
    if several:
        return list(itertools.chain(*taken))
    if isinstance(first, np.ndarray):
        return np.concatenate(taken)
    filling = padding.values.get(name, 0)
    if padding.side == "left" and name in padding.unread_first:
        taken = [F.pad(part[:, 1:], (1, 0), value=filling) for part in taken]
    taken = _pad_alike(taken, padding.side, filling)
    return taken[0] if len(taken) == 1 else torch.cat(taken)


def _taken(value: Any, row: Rows | slice) -> Any:
    if isinstance(row, slice):
        return value[row]
    if isinstance(value, Tensor):
        return value.index_select(0, row.there if row.there.device == value.device else row.host.to(value.device))
    return value[row.host.numpy()] if isinstance(value, np.ndarray) else [value[i] for i in row.host.tolist()]


def _pad_alike(tensors: list[Tensor], side: str, value: float) -> list[Tensor]:
    """Pad all but the first dimension to the largest of each."""
    shapes = [tensor.shape[1:] for tensor in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return tensors
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for tensor in tensors:
        widths: list[int] = []
        for size, target in zip(reversed(tensor.shape[1:]), reversed(largest), strict=True):
            widths += [target - size, 0] if side == "left" else [0, target - size]
        padded.append(F.pad(tensor, widths, value=value))
    return padded


# Entries whose padding is known, so that rows of different lengths can be brought together.
PADDED = frozenset({*TOKEN_ENTRIES, "decoder_input_ids", "decoder_attention_mask", "pixel_mask", "token_labels"})


def not_rows(batches: Sequence[Any], sizes: Sequence[int]) -> str | None:
    """Say what of some batches is not one row an example, so that examples cannot be taken from it; or None.

    Args:
        batches: Dicts, of so many examples each.
        sizes: How many.
    """
    found = _entry_not_rows(batches, sizes)
    if found is None:
        return None
    name, problem = found
    return f"the batch entry {name!r} {problem}, so it is not known which of it belongs to which example"


def _entry_not_rows(batches: Sequence[Any], sizes: Sequence[int]) -> tuple[str, str] | None:
    for name in batches[0]:
        problem = _not_rows(name, [batch.get(name) for batch in batches], sizes)
        if problem is not None:
            return name, problem
    return None


def _not_rows(name: str, values: Sequence[Any], sizes: Sequence[int]) -> str | None:
    first = values[0]
    kinds = {Tensor if isinstance(value, Tensor) else type(value) for value in values}
    if len(kinds) > 1:
        return "is not in every batch, or not of one type"
    if isinstance(first, Mapping):
        found = _entry_not_rows(values, sizes)
        return None if found is None else f"holds {found[0]!r}, which {found[1]}"
    if (isinstance(first, Tensor | np.ndarray) and first.ndim > 0) or isinstance(first, list | tuple):
        pairs = list(zip(values, sizes, strict=True))
        if isinstance(first, list | tuple) and any(isinstance(entry, Tensor) for entry in first):
            return next(filter(None, (_not_rows(name, parts, sizes) for parts in zip(*values, strict=True))), None)
        wrong = next(((len(value), size) for value, size in pairs if len(value) != size), None)
        if wrong is not None:
            return f"has {wrong[0]} rows for {wrong[1]} examples"
        if isinstance(first, Tensor) and any(value.shape[1:] != first.shape[1:] for value in values):
            additive = "mask" in name and first.is_floating_point()
            return "has rows of different shapes" if name not in PADDED or additive else None
        return None
    same = all(bool((value == first).all()) if isinstance(value, Tensor) else value == first for value in values)
    return None if same else "is one for the whole batch, and differs from batch to batch"


class PooledBatches:
    """The ``B`` examples of one importance step, as the batches they came in.

    Args:
        batches: The own batch first, then the reserve; on the device.
        padding: How rows of different batches are brought together.
        lengths: Columns of each text that are no padding, on the CPU; None where the host does not know them all.
    """

    def __init__(self, batches: Sequence[Any], padding: Padding, lengths: Sequence[Tensor | None] = (None,)) -> None:
        self.batches = list(batches)
        self.padding = padding
        known = [one for one in lengths if one is not None]
        self.lengths = torch.cat(known) if len(known) == len(lengths) else None
        self.sizes = [batch_size_of(batch) for batch in self.batches]

    def __len__(self) -> int:
        """Give the number of examples, ``B``."""
        return sum(self.sizes)

    @property
    def in_lengths(self) -> bool:
        """Whether its examples are texts or the like, each padded to the longest of its batch."""
        return any(name in self.batches[0] for name in ("input_ids", "attention_mask"))

    def chunks(self, size: int | None) -> Iterator[Any]:
        """Give all examples in order, in batches of at most ``size``, or as they came where it is None."""
        if size is None:
            yield from self.batches
            return
        starts = [0, *itertools.accumulate(self.sizes)]
        for first in range(0, len(self), size):
            last, parts = min(first + size, len(self)), []
            for batch, start, end in zip(self.batches, starts, starts[1:], strict=False):
                if max(first, start) < min(last, end):
                    parts.append((batch, slice(max(first, start) - start, min(last, end) - start), end - start))
            (batch, rows, whole), *others = parts
            if not others and rows == slice(0, whole):
                yield batch  # as it came, without a copy
            else:
                yield merge_rows([batch for batch, _, _ in parts], [row for _, row, _ in parts], self.padding)

    def texts(self, rows: Tensor) -> Any:
        """Gather texts whose lengths the host knows, no wider than the longest; ``rows`` as for :meth:`take`."""
        assert self.lengths is not None
        return self.take(rows, int(self.lengths[rows].max()))[0]

    def take(self, index: Tensor, width: int | None = None) -> tuple[Any, Tensor]:
        """Gather examples into one batch.

        Args:
            index: Which, in ``[0, B)``, with repeats or without; on the CPU, shape ``(n,)``.
            width: Of texts: columns that hold all of these; the rest is padding, and left out. None: all.

        Returns:
            The batch, its rows sorted by where they came from, and the permutation of ``index`` that gives that order.
        """
        order = index.argsort(stable=True)
        sorted_index = index[order]
        ends = torch.tensor(self.sizes).cumsum(0)
        counts = torch.bincount(torch.bucketize(sorted_index, ends, right=True), minlength=len(self.sizes))
        parts = sorted_index.split(counts.tolist())
        used = [
            (batch if width is None else cut(batch, width, self.padding), part - (end - size))
            for batch, part, end, size in zip(self.batches, parts, ends.tolist(), self.sizes, strict=True)
            if len(part)
        ]
        return merge_rows([batch for batch, _ in used], [row for _, row in used], self.padding), order


def cut(batch: Mapping[str, Any], width: int, padding: Padding) -> dict[str, Any]:
    """Leave out the columns of a batch of texts, padded on the right, that hold padding only; views.

    Args:
        batch: Has an attention mask.
        width: Columns that hold more; one is left of texts of which nothing is read.
        padding: Says of what their number is a multiple.
    """
    columns = batch["attention_mask"].shape[1]
    width = min(-(-max(width, 1) // padding.multiple) * padding.multiple, columns)
    return {n: v[:, :width] if width < columns and has_columns(n, v, columns) else v for n, v in batch.items()}


def has_columns(name: str, value: Any, columns: int) -> bool:
    """Whether a batch entry has one column a token; float labels are several an example, by chance as many."""
    if name not in TOKEN_ENTRIES or not isinstance(value, Tensor) or value.shape[1:] != (columns,):
        return False
    return not (name.endswith("labels") and value.is_floating_point())


def stand_for(
    pool: PooledBatches, rows: Tensor, weights: Tensor, scale: float, width: int | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Make a batch of kept examples.

    Args:
        pool: The examples.
        rows: Which of them, int64, shape ``(n,)``; on the CPU.
        weights: Their importance weights, which leave the mean over all that is kept unbiased, shape ``(n,)``.
        scale: What the loss of each is multiplied by beside: examples of the own batches over those that are kept,
            times the share that the step keeps, the same on all ranks, by which its item count is multiplied too.
        width: As for :meth:`PooledBatches.take`.

    Returns:
        The batch, with its entry ``importance_weights``, on the device; and the weights of its rows, on the CPU,
        without the scale, float32, shape ``(n,)``.
    """
    batch, order = pool.take(rows, width)
    weights = weights[order].float()
    on_device, given = to_device(weights * scale, first_of(batch).device), batch.get(WEIGHTS)
    return {**batch, WEIGHTS: on_device if given is None else given * on_device}, weights
