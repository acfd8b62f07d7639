"""How the history method reads the dataset: every batch knows its examples, and a pass is loaded in its own order.

The index of each example travels inside the batch, in the entry ``importance_index``. A record kept at the side would
be wrong wherever somebody fetches ahead: accelerate's loaders are one batch ahead of the trainer, workers several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_importance.batches import WEIGHTS, fetch, isolated_rng, key_to_seed, loader_like
from hf_importance.history import Pass

INDEX = "importance_index"  # a batch entry, int64, shape (b,): which examples of the training set it holds


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


class PassDataset(Dataset):
    """The collated, weighted micro-batches of a pass on one rank; each the same whoever asks for it, and when.

    Args:
        dataset: What the Trainer's own loader reads, an :class:`IndexedDataset`.
        collate: What it collates with, an :class:`IndexedCollator`.
        current: The pass.
        seed: What the dataset's and the collator's random numbers are keyed by, with the pass, rank and position.
        rank: Index of this process.
        ranks: Number of processes.
    """

    def __init__(self, dataset: Any, collate: Any, current: Pass, seed: int, rank: int, ranks: int) -> None:
        self.dataset, self.collate = dataset, collate
        self.current, self.seed, self.rank, self.ranks = current, seed, rank, ranks

    def __len__(self) -> int:
        """Give the number of micro-batches."""
        return self.current.length

    def __getitem__(self, micro: int) -> dict[str, Any]:
        """Load one micro-batch."""
        rows = self.current.rows(micro, self.rank, self.ranks)
        with isolated_rng(key_to_seed(self.seed, self.rank, self.current.number, micro, 5)):
            batch = self.collate(fetch(self.dataset, self.current.index[rows].tolist()))
        weights = self.current.weights[rows]
        return {**batch, WEIGHTS: batch[WEIGHTS] * weights if WEIGHTS in batch else weights}


def pass_batches(like: DataLoader, current: Pass, seed: int, rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """Give the micro-batches of a pass that are still to come, loaded as the Trainer's own loader does.

    Args:
        like: The Trainer's loader.
        current: The pass; its position says where to begin.
        seed: See :class:`PassDataset`.
        rank: Index of this process.
        ranks: Number of processes.
    """
    dataset = PassDataset(like.dataset, like.collate_fn, current, seed, rank, ranks)
    return iter(loader_like(like, dataset, range(current.position, current.length)))


def without_index(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Split a batch into what the model takes and the indices of its examples, if it carries them."""
    if INDEX not in inputs:
        return inputs, None
    return {name: value for name, value in inputs.items() if name != INDEX}, inputs[INDEX]
