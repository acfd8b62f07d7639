"""Batches that know their examples: the index of each travels inside the batch, in the entry ``importance_index``.

A record kept at the side would be wrong wherever somebody fetches ahead: accelerate's loaders are one batch ahead of
the trainer, workers several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from hf_importance.batches.entries import INDEX
from hf_importance.batches.reading import fetch


class Visit(NamedTuple):
    """An example with its index. No dict, so that nothing takes it for one with columns to remove."""

    index: int
    example: Any


class IndexedDataset(Dataset):
    """A map-style dataset whose examples carry their index.

    Args:
        dataset: Has ``__len__`` and ``__getitem__``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Visit:
        """Give one example."""
        return Visit(index, self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Visit]:
        """Give several examples, by the batched access of the dataset where it has one."""
        return [Visit(i, example) for i, example in zip(indices, fetch(self.dataset, indices), strict=True)]


class IndexedCollator:
    """Collates examples as ``collate`` does, and adds their indices to the batch.

    Args:
        collate: Makes a batch of a list of examples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, visits: list[Visit]) -> dict[str, Any]:
        """Collate.

        Raises:
            ValueError: The batch is no dict.
        """
        batch = self.collate([visit.example for visit in visits])
        if not isinstance(batch, Mapping):
            raise ValueError(
                "Whatever remembers scores puts the examples' indices into the batch, so the data_collator must "
                f"give a dict, but it gives {type(batch).__name__}. Let it give one, or use "
                "importance_method='presample'."
            )
        return {**batch, INDEX: torch.tensor([visit.index for visit in visits])}
