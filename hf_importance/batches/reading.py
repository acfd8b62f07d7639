"""Reading a dataset as the Trainer's own loader does: its workers, its pinning, its batched access."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def fetch(dataset: Any, indices: list[int]) -> list[Any]:
    """Give several examples, as torch's own loader does."""
    # By the batched access where there is one: datasets.Dataset is far faster by it.
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def _as_it_is(batch: Any) -> Any:
    """Give a batch as the collator has made it: torch's own way would make lists of tuples and tensors of arrays."""
    return batch


def loader_like(like: DataLoader, batches: Dataset, positions: Iterable[Any]) -> DataLoader:
    """Give a loader of ready batches with the workers, the pinning and the prefetching of another.

    Args:
        like: The Trainer's own loader.
        batches: Gives a collated batch for each position.
        positions: Which batches, in order.
    """
    # torch's own default is 2.
    workers = {"prefetch_factor": like.prefetch_factor or 2} if like.num_workers else {}
    return DataLoader(
        batches,
        sampler=positions,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=like.num_workers,
        # torch warns where there is nothing to copy to.
        pin_memory=like.pin_memory and torch.accelerator.is_available(),
        multiprocessing_context=like.multiprocessing_context,
        worker_init_fn=like.worker_init_fn,
        # The loader draws its workers' base seed from this one instead of the global one.
        generator=torch.Generator().manual_seed(0),
        **workers,
    )
