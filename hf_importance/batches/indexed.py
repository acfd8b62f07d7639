"""Batches that know their examples: the index of each travels inside the batch, in the entry ``importance_index``.

A record kept at the side would be wrong wherever somebody fetches ahead: accelerate's loaders are one batch ahead of
the trainer, workers several.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_importance.batches.entries import INDEX, LENGTHS
from hf_importance.batches.lengths import ends_of
from hf_importance.batches.reading import fetch


class Visit(NamedTuple):
    """An example with its index."""

    index: int
    example: Any


class NamedVisit(UserDict[str, Any]):
    """The same, of entries that have names: a collator of the user's own, which knows of no index, finds its example.

    It is no ``dict``, so that nothing takes it for one with columns to remove.
    """

    def __init__(self, index: int, example: Mapping[str, Any]) -> None:
        super().__init__(example)
        self.index, self.example = index, example


class IndexedDataset(Dataset):
    """A map-style dataset whose examples carry their index where a loader asks for several.

    Args:
        dataset: Has ``__len__`` and ``__getitem__``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Give what the dataset gives: a user's own sampler may go through its examples, or read a column."""
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        """Give what else the dataset has."""
        if name == "dataset":  # not made yet, as while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, indices: list[int]) -> list[Visit | NamedVisit]:
        """Give several examples, by the batched access of the dataset where it has one."""
        found = zip(indices, fetch(self.dataset, indices), strict=True)
        return [(NamedVisit if isinstance(example, Mapping) else Visit)(i, example) for i, example in found]


class IndexedCollator:
    """Collates examples as ``collate`` does, and adds their indices to the batch, and of texts the lengths.

    Args:
        collate: Makes a batch of a list of examples.
        shared: Whether one process reads for all, and hands on to each its part of what is a tensor.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], shared: bool = False) -> None:
        self.collate, self.shared = collate, shared

    def __call__(self, visits: list[Visit | NamedVisit]) -> Any:
        """Collate; a batch that is no dict has no place for them, and stays as it is."""
        batch = self.collate([visit.example for visit in visits])
        if not isinstance(batch, Mapping):
            return batch
        index = np.array([visit.index for visit in visits], dtype=np.int64)
        if self.shared:
            return {**batch, INDEX: torch.from_numpy(index)}
        lengths = ends_of(batch)  # a batch on the device cannot be asked without waiting for it
        known = lengths is not None and lengths.device.type == "cpu"
        return {**batch, INDEX: index} | ({LENGTHS: lengths.numpy()} if known else {})
