"""Texts of alike length together, so that little is padded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, LENGTHS, TOKEN_ENTRIES, batch_size_of
from hf_importance.batches.pool import Padding, PooledBatches, cut, has_columns, merge_rows
from hf_importance.batches.reserve import split_evenly


def lengths_of(batch: Any, padding: Padding) -> Tensor | None:
    """Give the columns of each text behind which there is only padding; int64, shape ``(b,)``, where the batch is.

    None where that is not known, or where it is padded on the left: leaving that out would move positions.
    """
    return ends_of(batch) if padding.side == "right" else None


def lengths_on_host(batch: Mapping[str, Any], padding: Padding) -> Tensor | None:
    """Give the same without waiting for a device: of a batch on the CPU, or one that says it. Else None."""
    if LENGTHS in batch and padding.side == "right":
        return torch.from_numpy(batch[LENGTHS])
    mask = batch.get("attention_mask")
    return lengths_of(batch, padding) if isinstance(mask, Tensor) and mask.device.type == "cpu" else None


def lengths_on_device(pool: PooledBatches) -> list[Tensor]:
    """Give the lengths of each batch of a pool where the host does not know them; empty where nobody does."""
    found = [] if pool.lengths is not None else [lengths_of(batch, pool.padding) for batch in pool.batches]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else []


def ends_of(batch: Any) -> Tensor | None:
    """Give the columns behind the last one of each text that is no padding; int64, shape ``(b,)``.

    None where that is not known: no attention mask, or entries whose columns may mean something else.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == 0:
        return None
    if any(isinstance(v, Tensor) and v.dim() > 1 and name not in TOKEN_ENTRIES for name, v in batch.items()):
        return None
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = ((mask != 0) * columns).amax(dim=1)
    for name, value in batch.items():
        # Labels may be those of a decoder, or several an example, and by chance as many as the text has tokens.
        if str(name).endswith("labels") and has_columns(name, value, len(columns)):
            lengths = torch.maximum(lengths, ((value != IGNORED_LABEL) * columns).amax(dim=1))
    return lengths


def sort_by_length(batches: Sequence[Any], size: int, padding: Padding) -> list[Any] | None:
    """Put texts of alike length into one batch each and cut the padding that this saves.

    Args:
        batches: Batches on the CPU, so that looking at their lengths waits for no device.
        size: Rows of a new batch, at most.
        padding: How the batches were padded.

    Returns:
        The new batches, all rows in order of their length; None where nothing is known to be saved.
    """
    if lengths_of(batches[0], padding) is None or batches[0]["attention_mask"].device.type != "cpu":
        return None
    merged = merge_rows(batches, [slice(0, batch_size_of(batch)) for batch in batches], padding)
    lengths = lengths_of(merged, padding)
    assert lengths is not None
    parts = lengths.argsort(stable=True).split(split_evenly(len(lengths), size))
    return [merge_rows([cut(merged, int(lengths[rows].max()), padding)], [rows], padding) for rows in parts]


def passes_by_length(pool: PooledBatches, size: int | None) -> list[Tensor] | None:
    """Say which texts of a pool are scored together, so that those of alike length are.

    Args:
        pool: Its own batch came as it was drawn; what completes it may be sorted already.
        size: Texts of a pass, at most; None: those of the largest batch.

    Returns:
        The rows of each pass, int64, ascending; None where the host does not know all lengths, or nothing is saved.
    """
    if pool.lengths is None:
        return None
    parts = pool.lengths.argsort(stable=True).split(split_evenly(len(pool), size or max(pool.sizes)))
    widths = [batch["attention_mask"].shape[1] for batch in pool.batches]
    tokens = sum(width * rows for width, rows in zip(widths, pool.sizes, strict=True))
    if sum(len(rows) * int(pool.lengths[rows].max()) for rows in parts) >= tokens:
        return None
    return [rows.sort().values for rows in parts]


def in_passes(rest: list[Any], size: int, batch_size: int, padding: Padding) -> list[Any]:
    """Split what completes a pool into what one forward pass scores: texts by length, others as they came.

    Args:
        rest: Batches on the CPU; one alone may be larger than a batch of training.
        size: Texts of a pass, at most.
        batch_size: Others of a pass, at most.
        padding: How the batches were padded.
    """
    found = sort_by_length(rest, size, padding) if rest else None
    if found is None and len(rest) == 1 and batch_size_of(rest[0]) > batch_size:
        sizes = split_evenly(batch_size_of(rest[0]), batch_size)
        ends = itertools.accumulate(sizes)
        parts = [slice(end - part, end) for end, part in zip(ends, sizes, strict=True)]
        found = [merge_rows(rest, [part], padding) for part in parts]  # views
    return found or rest
