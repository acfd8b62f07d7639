"""Texts of alike length together, so that little is padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, TOKEN_ENTRIES, batch_size_of
from hf_importance.batches.pool import Padding, merge_rows
from hf_importance.batches.reserve import split_evenly


def sort_by_length(batches: Sequence[Any], size: int, padding: Padding) -> list[Any] | None:
    """Put texts of alike length into one batch each and cut the padding that this saves.

    Args:
        batches: Batches on the CPU, so that looking at their lengths waits for no device.
        size: Rows of a new batch, at most.
        padding: How the batches were padded.

    Returns:
        The new batches, all rows in order of their length; None where nothing is known to be saved: no attention
        mask, padding on the left (cutting it would move positions), or entries whose columns may mean something else.
    """
    mask = batches[0].get("attention_mask") if isinstance(batches[0], Mapping) else None
    if mask is None or mask.dim() != 2 or mask.device.type != "cpu" or padding.side != "right":
        return None
    if any(isinstance(v, Tensor) and v.dim() > 1 and name not in TOKEN_ENTRIES for name, v in batches[0].items()):
        return None
    merged = merge_rows(batches, [torch.arange(batch_size_of(batch)) for batch in batches], padding)
    columns = torch.arange(1, merged["attention_mask"].shape[1] + 1)
    lengths = (merged["attention_mask"] * columns).amax(dim=1)
    sorted_batches = []
    for rows in lengths.argsort(stable=True).split(split_evenly(len(lengths), size)):
        batch, width = merge_rows([merged], [rows], padding), int(lengths[rows].max())
        for name, value in batch.items():
            if _may_cut(name, value, len(columns), width):
                batch[name] = value[:, :width].contiguous()  # some models view their inputs
        sorted_batches.append(batch)
    return sorted_batches


def _may_cut(name: str, value: Any, columns: int, width: int) -> bool:
    """Say whether all that an entry holds behind column ``width`` is padding."""
    if name not in TOKEN_ENTRIES or not isinstance(value, Tensor) or value.shape[1:] != (columns,):
        return False
    # Labels may be those of a decoder, or several an example, and by chance as many as the text has tokens.
    return not name.endswith("labels") or bool((value[:, width:] == IGNORED_LABEL).all())
