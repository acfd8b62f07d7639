"""The pool of one step: the Trainer's own batch, batches from an endless reserve, and the rows that are kept of both.

A reserve batch is a pure function of ``(seed, rank, position)``: which examples it holds, and every random number
that the dataset and the collator draw for it. So workers may prefetch, a resumed run needs only the position, and the
global random streams stay exactly where the Trainer has them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_importance.losses import IGNORED_LABEL

WEIGHTS = "importance_weights"  # a batch entry, shape (b,): what each example's loss is multiplied by


def key_to_seed(*key: int) -> int:
    """Give a well mixed 63-bit seed for a tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside the block, and put them back as they were behind it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would seed every accelerator too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def reserve_unit(batch_size: int) -> int:
    """Give the examples in one reserve batch where a pool's size follows the cost rule: a quarter of a batch."""
    return max(batch_size // 4, 1)


def reserve_sizes(batch_size: int, ratio: float | None, examples: int) -> list[int]:
    """Give the sizes of the reserve batches whose examples are distinct: those of a pool, or of four batches.

    Args:
        batch_size: ``b``.
        ratio: ``B / b``, or None where it follows the cost rule.
        examples: Length of the dataset.
    """
    if ratio is None:
        unit = reserve_unit(batch_size)
        return [unit] * max(min(4 * batch_size, examples) // unit, 1)
    return split_evenly(math.ceil(batch_size * ratio) - batch_size, batch_size)


def split_evenly(total: int, largest: int) -> list[int]:
    """Split ``total`` into the fewest parts of at most ``largest``, as even as can be.

    >>> split_evenly(48, 32)
    [24, 24]
    """
    parts = -(-total // largest)
    return [total // parts + (i < total % parts) for i in range(parts)]


def fetch(dataset: Any, indices: list[int]) -> list[Any]:
    """Give several examples, as torch's own loader does."""
    # By the batched access where there is one: datasets.Dataset is far faster by it.
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def loader_like(like: DataLoader, batches: Dataset, positions: Iterable[int], batches_ahead: int = 1) -> DataLoader:
    """Give a loader of ready batches with the workers, the pinning and the prefetching of another.

    Args:
        like: The Trainer's own loader.
        batches: Gives a collated batch for each position.
        positions: Which batches, in order.
        batches_ahead: How many of them workers load ahead for each batch that the other's do.
    """
    # torch's own default is 2.
    workers = {"prefetch_factor": (like.prefetch_factor or 2) * batches_ahead} if like.num_workers else {}
    return DataLoader(
        batches,
        sampler=positions,
        batch_size=None,
        num_workers=like.num_workers,
        # torch warns where there is nothing to copy to.
        pin_memory=like.pin_memory and torch.accelerator.is_available(),
        multiprocessing_context=like.multiprocessing_context,
        # The loader draws its workers' base seed from this one instead of the global one.
        generator=torch.Generator().manual_seed(0),
        **workers,
    )


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
    """

    def __init__(self, dataset: ReserveDataset, like: DataLoader, position: int, batches_ahead: int = 1) -> None:
        self.position = position
        self._batches = iter(loader_like(like, dataset, itertools.count(position), batches_ahead))

    def __iter__(self) -> Reserve:
        """Give itself."""
        return self

    def __next__(self) -> Any:
        """Give the next batch."""
        self.position += 1
        return next(self._batches)


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


def batch_size_of(batch: Any) -> int:
    """Give the number of rows of a batch: the length of its first tensor.

    Raises:
        ValueError: It holds no tensor.
    """
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
        if isinstance(value, Mapping | list | tuple):
            with contextlib.suppress(ValueError):
                return batch_size_of(value)
    raise ValueError("A batch of train_dataset holds no tensor, so its examples cannot be told apart.")


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


# Entries of a batch of text that have one column a token.
TOKEN_ENTRIES = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "labels", "shift_labels"}
)


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


class Pool:
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
