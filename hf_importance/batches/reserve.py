"""Where the rest of a pool comes from: an endless reserve of examples, drawn as the Trainer's loader draws them.

Which examples a reserve batch holds is a pure function of ``(seed, rank, position)``, and every random number that the
dataset and the collator draw is one of these and of how many batches are collated as one. So workers may prefetch, a
resumed run needs only the position, and the global random streams stay exactly where the Trainer has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_utils import has_length

from hf_importance.batches.pool import Padding, merge_rows
from hf_importance.batches.random import isolated_rng, key_to_seed
from hf_importance.batches.reading import fetch, loader_like


@dataclass(frozen=True)
class Population:
    """Examples that may be drawn, and how often.

    Attributes:
        examples: How many the dataset has.
        subset: Which of them, int64; None: all.
        probabilities: Of each of these, summing to 1; None: all alike.
        replacement: Whether one may come twice among examples that are drawn together.
    """

    examples: int
    subset: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    replacement: bool = False

    @property
    def uniform(self) -> bool:
        """Whether every example of the dataset is drawn as often as any other."""
        return self.subset is None and self.probabilities is None

    def __len__(self) -> int:
        """Give how many examples may be drawn."""
        return self.examples if self.subset is None else len(self.subset)

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Draw examples together; int64, shape ``(size,)``."""
        found = generator.choice(len(self), size, replace=self.replacement, p=self.probabilities)
        return found if self.subset is None else self.subset[found]


def population_of(loader: DataLoader) -> Population | str:
    """Say what a map-style loader draws from, or why nobody can.

    Args:
        loader: The Trainer's, or the user's own.
    """
    if not has_length(loader.dataset):
        return f"the loader's dataset, a {type(loader.dataset).__name__}, has no length"
    sampler, examples = _sampler_of(loader), len(loader.dataset)  # pyrefly: ignore[bad-argument-type]
    kind = type(sampler)
    if kind is WeightedRandomSampler and not sampler.replacement:
        return (
            "the loader's WeightedRandomSampler has replacement=False, so how often it draws an example depends on "
            "how many it draws in all. Pass replacement=True"
        )
    if kind is WeightedRandomSampler:
        weights = sampler.weights.double().numpy()
        return Population(examples, None, weights / weights.sum(), replacement=True)
    if kind is SubsetRandomSampler:
        return Population(examples, np.asarray(sampler.indices))
    if kind in (RandomSampler, SeedableRandomSampler):
        drawn = len(sampler.data_source)
        return Population(examples, None if drawn == examples else np.arange(drawn))
    if kind.__module__.startswith("transformers."):  # the Trainer's own ways to group by length: all, in some order
        return Population(examples)
    if kind is SequentialSampler:
        return "the loader reads the examples in an order, which others drawn in between would break"
    return (
        f"the loader's {kind.__name__} may give an order, or some examples more often than others, and nobody can "
        "tell which. Known are torch's RandomSampler, SubsetRandomSampler and WeightedRandomSampler"
    )


def _sampler_of(loader: DataLoader) -> Sampler | Any:
    """Give the sampler behind what accelerate wraps around it."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else batches


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
    """Batches of uniformly drawn examples in a row, collated as one: the same whoever asks for them, and when.

    The examples of one pool's reserve, ``len(sizes)`` batches in a row, are distinct.

    Args:
        dataset: Map-style training set, with at least ``sum(sizes)`` examples.
        collate: Makes a batch of a list of examples.
        sizes: Batch sizes, repeated for ever.
        seed: With ``rank``, what the draws are keyed by.
        rank: Index of this process.
        population: What is drawn from, with at least as many examples; None: all of the dataset, alike.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Any,
        sizes: Sequence[int],
        seed: int,
        rank: int,
        population: Population | None = None,
    ) -> None:
        self.dataset = dataset
        self.population = population or Population(len(dataset))
        self.collate = collate
        self.sizes = list(sizes)
        self.seed = seed
        self.rank = rank

    def indices(self, position: int, count: int = 1) -> list[int]:
        """Give the examples of ``count`` batches from ``position`` on."""
        found: list[int] = []
        ends = [0, *itertools.accumulate(self.sizes)]
        while count:
            pool, part = divmod(position, len(self.sizes))
            until = min(part + count, len(self.sizes))
            generator = np.random.default_rng(key_to_seed(self.seed, self.rank, pool))
            drawn = self.population.draw(ends[-1], generator)
            found += drawn[ends[part] : ends[until]].tolist()
            position, count = position + until - part, count - until + part
        return found

    def __getitem__(self, asked: tuple[int, int]) -> Any:
        """Fetch so many batches from a position on, ``(position, count)``, and collate them as one."""
        indices = self.indices(*asked)
        with isolated_rng(key_to_seed(self.seed, self.rank, asked[0], 1)):
            return self.collate(fetch(self.dataset, indices))


class Reserve:
    """Hands out the batches of a :class:`ReserveDataset`, loaded as the Trainer's own loader does.

    Without workers what is asked for is collated as one. Workers load ahead, before anybody knows how much will be
    asked for: they collate several batches as one, and what is handed out are rows of it, views.

    Args:
        dataset: The batches.
        like: The Trainer's loader.
        position: Where to begin.
        together: Batches that a worker collates as one.

    Attributes:
        position: How many batches were handed out since the start of training.
        sizes: Of the batches, repeated for ever.
    """

    def __init__(self, dataset: ReserveDataset, like: DataLoader, position: int, together: int) -> None:
        self.position, self.sizes = position, dataset.sizes
        self._together, self._ahead = together, like.num_workers > 0
        self._begin = self._end = 0  # of what a worker has loaded
        self._rows: Any = None
        first = position - position % together
        asked = ((p, together) for p in itertools.count(first, together)) if self._ahead else self._asked()
        self._loaded = iter(loader_like(like, dataset, asked))

    def _asked(self) -> Iterator[tuple[int, int]]:
        while True:
            yield self._begin, self._end - self._begin

    def take(self, count: int) -> list[Any]:
        """Give the next ``count`` batches, as few as may be."""
        start, self.position = self.position, self.position + count
        if not self._ahead:
            self._begin, self._end = start, self.position
            return [next(self._loaded)]
        found = []
        while start < self.position:
            if start >= self._end:
                self._begin = start - start % self._together
                self._end, self._rows = self._begin + self._together, next(self._loaded)
            until = min(self._end, self.position)
            found.append(self._between(start, until))
            start = until
        return found

    def _between(self, start: int, until: int) -> Any:
        if (start, until) == (self._begin, self._end):
            return self._rows
        size = [sum(self.sizes[p % len(self.sizes)] for p in range(self._begin, end)) for end in (start, until)]
        return merge_rows([self._rows], [slice(*size)], Padding())
