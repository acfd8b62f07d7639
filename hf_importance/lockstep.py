"""Ranks in step: none takes a batch, or makes a forward pass, that another does not, so none waits for ever.

accelerate gives every rank as many batches as the others, with two exceptions: a stream of which each rank reads a
part (``dispatch_batches=False``) ends when that part does, and a loader of the user's own is as long as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import DataLoader, IterableDataset


class Lockstep:
    """Sees to it that all ranks train on the same number of batches; for several ranks only.

    All ranks must make it, at the same point of a run.

    Args:
        loader: This rank's own loader.
        accelerator: Reaches the other ranks.

    Raises:
        ValueError: The loaders of the ranks differ in length.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        stream = isinstance(loader.dataset, IterableDataset)
        lengths = self._from_all_ranks(-1 if stream else len(loader))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The train dataloaders of the ranks have {lengths} batches, and all ranks must take as many, or one "
                "waits for the others for ever. Leave it to Trainer to split train_dataset, or cut your loaders to "
                "the same length."
            )
        # One process reads a dispatched stream for all, so it ends for all at once.
        self._apart = stream and not isinstance(loader, DataLoaderDispatcher)
        self._ended: object = None

    def _from_all_ranks(self, value: int) -> list[int]:
        return self._accelerator.gather(torch.tensor([value], device=self._accelerator.device)).tolist()

    def take(self, iterator: Iterator[Any], count: int, epoch: object) -> Iterator[Any]:
        """Give the batches of one optimizer step, and the rest of the stream behind them.

        Where each rank reads a part of the stream, one number crosses the network, and the stream ends for all where
        it ends for the first; what others have left of it is not trained on in this epoch.

        Args:
            iterator: This rank's batches of the epoch.
            count: Batches that the step takes.
            epoch: Another object in every epoch: the Trainer's own iterator.
        """
        if not self._apart:
            return iterator
        if epoch is self._ended:
            return iter(())
        batches = list(itertools.islice(iterator, count))
        fewest = min(self._from_all_ranks(len(batches)))
        if fewest < count:
            self._ended = epoch
            return iter(batches[:fewest])
        return itertools.chain(batches, iterator)
