"""What this package puts into a batch beside the user's own entries, and how many examples a batch holds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WEIGHTS = "importance_weights"  # a batch entry, shape (b,): what each example's loss is multiplied by
# A batch entry, int64, shape (b,): which examples of the training set it holds. Of NumPy's, so that whoever moves a
# batch to the device leaves it where it is read.
INDEX = "importance_index"
LENGTHS = "importance_lengths"  # likewise: the columns of each text behind which there is only padding
IGNORED_LABEL = -100  # the label that losses of transformers leave out
# Entries of a batch of text that have one column a token.
TOKEN_ENTRIES = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "labels", "shift_labels"}
)


def first_of(batch: Any) -> Tensor:
    """Give the first tensor of a batch that has a dimension.

    Raises:
        ValueError: There is none.
    """
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
        if isinstance(value, Mapping | list | tuple):
            with contextlib.suppress(ValueError):
                return first_of(value)
    raise ValueError("A batch of train_dataset holds no tensor, so its examples cannot be told apart.")


def batch_size_of(batch: Any) -> int:
    """Give the number of rows of a batch: the length of its first tensor.

    Raises:
        ValueError: It holds no tensor.
    """
    return len(first_of(batch))


def index_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Give the indices of a batch's examples, if it carries them, on the CPU.

    Where one process reads for all they were moved to the device: they are back when it has done what it had to do.
    """
    index = inputs.get(INDEX)
    return None if index is None else torch.as_tensor(index).to("cpu", non_blocking=True)


def without_index(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Split a batch into what the model takes and the indices of its examples, if it carries them."""
    if INDEX not in inputs:
        return inputs, None
    return {name: value for name, value in inputs.items() if name not in (INDEX, LENGTHS)}, index_of(inputs)
