"""The pool of one step: the Trainer's own batch and batches of the reserve, and the rows that are kept of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, TOKEN_ENTRIES, WEIGHTS, batch_size_of


@dataclass(frozen=True)
class Padding:
    """How rows that were padded to different lengths become one batch.

    Attributes:
        side: ``"left"`` or ``"right"``.
        values: What a batch entry is padded with, by its name. Others get 0: a mask is off there.
        unread_first: Labels that a causal language model shifts: what stands first in a row is predicted from nothing
            and never read. With padding put in front of it, it would be.
    """

    side: str = "right"
    unread_first: frozenset[str] = frozenset()
    values: Mapping[str, float] = field(default_factory=lambda: {"labels": IGNORED_LABEL})


def merge_rows(batches: Sequence[Any], rows: Sequence[Tensor], padding: Padding) -> Any:
    """Gather the given rows of several batches into one batch, padded to the longest of them.

    Rows are taken on the device where each batch lies, and only they are copied. What is no tensor of the batch's
    length and no list of it is taken from the first batch.

    Args:
        batches: Batches with the same entries, each of any number of rows.
        rows: For each batch, the rows to take, in order; int64, any length.
        padding: How entries of different lengths are brought together.
    """
    return _merge(batches, rows, [batch_size_of(batch) for batch in batches], padding, name="")


def _merge(values: Sequence[Any], rows: Sequence[Tensor], sizes: Sequence[int], padding: Padding, name: str) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _merge([value[key] for value in values], rows, sizes, padding, key) for key in first}
    if isinstance(first, Tensor) and all(value.dim() > 0 for value in values):
        if all(len(value) == size for value, size in zip(values, sizes, strict=True)):
            taken = [value[row] for value, row in zip(values, rows, strict=True) if len(row)]
            filling = padding.values.get(name, 0)
            if padding.side == "left" and name in padding.unread_first:
                taken = [F.pad(part[:, 1:], (1, 0), value=filling) for part in taken]
            return torch.cat(_pad_alike(taken, padding.side, filling))
    elif isinstance(first, list | tuple):
        if all(len(value) == size for value, size in zip(values, sizes, strict=True)) and not any(
            isinstance(entry, Tensor) for entry in first
        ):
            return [value[i] for value, row in zip(values, rows, strict=True) for i in row.tolist()]
        return type(first)(_merge(list(entries), rows, sizes, padding, name) for entries in zip(*values, strict=True))
    return first


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
    if any(type(value) is not type(first) for value in values):
        return "is not in every batch, or not of one type"
    if isinstance(first, Mapping):
        found = _entry_not_rows(values, sizes)
        return None if found is None else f"holds {found[0]!r}, which {found[1]}"
    if (isinstance(first, Tensor) and first.dim() > 0) or isinstance(first, list | tuple):
        pairs = list(zip(values, sizes, strict=True))
        if any(isinstance(entry, Tensor) for entry in first) and not isinstance(first, Tensor):
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
    """

    def __init__(self, batches: Sequence[Any], padding: Padding) -> None:
        self.batches = list(batches)
        self.padding = padding
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
        starts = dict(zip(itertools.accumulate(self.sizes, initial=0), self.batches, strict=False))
        for start in range(0, len(self), size):
            rows = min(size, len(self) - start)
            if start in starts and batch_size_of(starts[start]) == rows:
                yield starts[start]  # as it came, without a copy
            else:
                yield self.take(torch.arange(start, start + rows))[0]

    def take(self, index: Tensor) -> tuple[Any, Tensor]:
        """Gather examples into one batch.

        Args:
            index: Which, in ``[0, B)``, with repeats or without; on the CPU, shape ``(n,)``.

        Returns:
            The batch, its rows sorted by where they came from, and the permutation of ``index`` that gives that order.
        """
        order = index.argsort(stable=True)
        sorted_index = index[order]
        ends = torch.tensor(self.sizes).cumsum(0)
        counts = torch.bincount(torch.bucketize(sorted_index, ends, right=True), minlength=len(self.sizes))
        parts = sorted_index.split(counts.tolist())
        used = [
            (batch, part - (end - size))
            for batch, part, end, size in zip(self.batches, parts, ends.tolist(), self.sizes, strict=True)
            if len(part)
        ]
        return merge_rows([batch for batch, _ in used], [row for _, row in used], self.padding), order


def stand_for(pool: PooledBatches, rows: Tensor, weights: Tensor, share: float) -> tuple[dict[str, Any], Tensor]:
    """Make the batch of kept examples that stands for the Trainer's own batch, the first of the pool.

    Args:
        pool: The examples.
        rows: Which of them are kept, int64, shape ``(n,)``; on the CPU.
        weights: Their importance weights, which leave the mean over them unbiased, shape ``(n,)``.
        share: Share of a batch that the optimizer step keeps, the same for all its batches and ranks, by which its
            item count is multiplied too. Rounding makes of it ``n / b``, which differs where batches differ in size;
            the loss weighs each batch by ``b`` all the same, as the uniform step does.

    Returns:
        The batch, with its entry ``importance_weights``, on the device; and the weights of its rows, on the CPU,
        without the share, float32, shape ``(n,)``.
    """
    batch, order = pool.take(rows)
    weights = weights[order].float()
    return _weighted(batch, weights * (share * pool.sizes[0] / len(rows))), weights


def keep_own(pool: PooledBatches, share: float) -> tuple[dict[str, Any], Tensor]:
    """Keep the Trainer's own batch of a pool, each example with weight 1; as :func:`stand_for`."""
    weights = torch.ones(pool.sizes[0])
    return _weighted(pool.batches[0], weights * share), weights


def _weighted(batch: Mapping[str, Any], weights: Tensor) -> dict[str, Any]:
    device = next(value.device for value in batch.values() if isinstance(value, Tensor))
    on_device = weights.to(device, non_blocking=True)
    given = batch.get(WEIGHTS)
    return {**batch, WEIGHTS: on_device if given is None else given * on_device}
