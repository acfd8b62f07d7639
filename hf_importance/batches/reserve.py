"""Where the rest of a pool comes from: an endless reserve of uniformly drawn examples.

A reserve batch is a pure function of ``(seed, rank, position)``: which examples it holds, and every random number
that the dataset and the collator draw for it. So workers may prefetch, a resumed run needs only the position, and the
global random streams stay exactly where the Trainer has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from hf_importance.batches.random import isolated_rng, key_to_seed
from hf_importance.batches.reading import fetch, loader_like


def reserve_unit(batch_size: int) -> int:
    """Give the examples in one reserve batch where the size of pools varies: a quarter of a batch."""
    return max(batch_size // 4, 1)


def reserve_sizes(batch_size: int, pool: int | None, examples: int) -> list[int]:
    """Give the sizes of the reserve batches whose examples are distinct: those of a pool, or of four batches.

    Args:
        batch_size: ``b``.
        pool: ``B``, or None where it varies.
        examples: Length of the dataset.
    """
    if pool is None:
        unit = reserve_unit(batch_size)
        return [unit] * max(min(4 * batch_size, examples) // unit, 1)
    return split_evenly(pool - batch_size, batch_size)


def split_evenly(total: int, largest: int) -> list[int]:
    """Split ``total`` into the fewest parts of at most ``largest``, as even as can be.

    >>> split_evenly(48, 32)
    [24, 24]
    """
    parts = -(-total // largest)
    return [total // parts + (i < total % parts) for i in range(parts)]


class ReserveDataset(Dataset):
    """Collated batches of uniformly drawn examples, by position: batch ``p`` is the same whoever asks, and when.

    The examples of one pool's reserve, ``len(sizes)`` batches in a row, are distinct.

    Args:
        dataset: Map-style training set, with at least ``sum(sizes)`` examples.
        collate: Makes a batch of a list of examples.
        sizes: Batch sizes, repeated for ever.
        seed: With ``rank``, what the draws are keyed by.
        rank: Index of this process.
    """

    def __init__(self, dataset: Any, collate: Any, sizes: Sequence[int], seed: int, rank: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self.sizes = list(sizes)
        self.seed = seed
        self.rank = rank

    def indices(self, position: int) -> list[int]:
        """Give the examples of the batch at ``position``."""
        pool, part = divmod(position, len(self.sizes))
        generator = np.random.default_rng(key_to_seed(self.seed, self.rank, pool))
        drawn = generator.choice(len(self.dataset), sum(self.sizes), replace=False)
        start = sum(self.sizes[:part])
        return drawn[start : start + self.sizes[part]].tolist()

    def __getitem__(self, position: int) -> Any:
        """Fetch and collate the batch at ``position``."""
        indices = self.indices(position)
        with isolated_rng(key_to_seed(self.seed, self.rank, position, 1)):
            return self.collate(fetch(self.dataset, indices))


class Reserve:
    """Endless iterator over the batches of a :class:`ReserveDataset`, loaded as the Trainer's own loader does.

    Args:
        dataset: The batches.
        like: The Trainer's loader.
        position: Where to begin.
        batches_ahead: How many reserve batches workers load ahead for each batch that the Trainer's do.

    Attributes:
        position: How many batches were handed out since the start of training.
        sizes: Of the batches, repeated for ever.
    """

    def __init__(self, dataset: ReserveDataset, like: DataLoader, position: int, batches_ahead: int = 1) -> None:
        self.position = position
        self.sizes = dataset.sizes
        self._batches = iter(loader_like(like, dataset, itertools.count(position), batches_ahead))

    def __iter__(self) -> Reserve:
        """Give itself."""
        return self

    def __next__(self) -> Any:
        """Give the next batch."""
        self.position += 1
        return next(self._batches)
