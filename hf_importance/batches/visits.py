"""Batches of examples that a sampler has named, loaded as the Trainer's own loader does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_importance.batches.entries import WEIGHTS
from hf_importance.batches.random import isolated_rng, key_to_seed
from hf_importance.batches.reading import fetch, loader_like


@dataclass(frozen=True)
class Order:
    """Examples in the order of their visits, in micro-batches, over all ranks.

    Attributes:
        index: Examples; int32, shape ``(n,)``.
        weights: What the loss of each is multiplied by; float32, shape ``(n,)``.
        batch_size: Examples of a micro-batch on each rank, on average; at least 1. Sizes differ by one at most.
        length: Micro-batches.
        number: Orders before this one.
        together: Micro-batches of an optimizer step, whose examples are gathered into the last of them, as few as hold
            them; 1: each has its own.
        whole: Examples that a micro-batch holds.
    """

    index: Tensor
    weights: Tensor
    batch_size: float
    length: int
    number: int
    together: int = 1
    whole: int = 1

    def rows(self, micro: int, rank: int, ranks: int) -> slice:
        """Give where a rank's examples of one micro-batch are: on all ranks as many."""
        start, end = self._bounds(micro)
        return slice(start * ranks + rank, end * ranks, ranks)

    def left_out(self, micro: int) -> bool:
        """Whether a micro-batch holds none, for others of its step do."""
        start, end = self._bounds(micro)
        return start == end

    def _bounds(self, micro: int) -> tuple[int, int]:
        first = micro - micro % self.together
        until = min(first + self.together, self.length)
        begin, end = self._before(first), self._before(until)
        filled = -(-(end - begin) // self.whole)
        if self.together == 1 or filled >= until - first:
            return self._before(micro), self._before(micro + 1)
        place = micro - (until - filled)
        parts = (begin + (end - begin) * max(p, 0) // filled for p in (place, place + 1))
        return next(parts), next(parts)

    def _before(self, micro: int) -> int:
        """Give a rank's examples before a micro-batch that has its own."""
        return math.floor(micro * self.batch_size)


class OrderedBatches(Dataset):
    """The collated, weighted micro-batches of an order on one rank; each the same whoever asks for it, and when.

    Args:
        dataset: What the Trainer's own loader reads, an :class:`~hf_importance.batches.indexed.IndexedDataset`.
        collate: What it collates with, an :class:`~hf_importance.batches.indexed.IndexedCollator`.
        order: Which examples.
        seed: What the dataset's and the collator's random numbers are keyed by, with the order's number, rank and
            position.
        rank: Index of this process.
        ranks: Number of processes.
    """

    def __init__(self, dataset: Any, collate: Any, order: Order, seed: int, rank: int, ranks: int) -> None:
        self.dataset, self.collate = dataset, collate
        self.order, self.seed, self.rank, self.ranks = order, seed, rank, ranks

    def __len__(self) -> int:
        """Give the number of micro-batches."""
        return self.order.length

    def __getitem__(self, micro: int) -> dict[str, Any]:
        """Load one micro-batch."""
        rows = self.order.rows(micro, self.rank, self.ranks)
        with isolated_rng(key_to_seed(self.seed, self.rank, self.order.number, micro, 5)):
            batch = self.collate(fetch(self.dataset, self.order.index[rows].tolist()))
        weights = self.order.weights[rows]
        return {**batch, WEIGHTS: batch[WEIGHTS] * weights if WEIGHTS in batch else weights}


def visit_batches(
    like: DataLoader, order: Order, start: int, seed: int, rank: int, ranks: int
) -> Iterator[dict[str, Any]]:
    """Give the micro-batches of an order from ``start`` on, but those left out, loaded as the Trainer's loader does.

    Args:
        like: The Trainer's loader.
        order: Which examples.
        start: The first micro-batch.
        seed: See :class:`OrderedBatches`.
        rank: Index of this process.
        ranks: Number of processes.
    """
    dataset = OrderedBatches(like.dataset, like.collate_fn, order, seed, rank, ranks)
    return iter(loader_like(like, dataset, [m for m in range(start, order.length) if not order.left_out(m)]))
