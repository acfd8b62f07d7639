"""How far a streaming dataset was read, and ranks in step: what the order of a loader's batches has to be kept for.

The Trainer skips the batches that were trained on. While importance sampling is on, a step reads the rest of its pool
from the same stream, so more must be skipped, and the stream ends sooner and is started over more often than the
Trainer can tell from the steps.

accelerate gives every rank as many batches as the others, with two exceptions: a stream of which each rank reads a
part (``dispatch_batches=False``) ends when that part does, and a loader of the user's own is as long as it is. No rank
may take a batch, or make a forward pass, that another does not, or it waits for ever.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import DataLoader, IterableDataset

from hf_importance.batches.random import isolated_rng


class Stream:
    """Iterator over the batches of a stream that knows its place.

    Args:
        loader: The Trainer's own loader.
        epoch: The epoch in which the Trainer starts.
        skipped: How many batches of it the Trainer skips.
        passes: How often the stream had been started over when the checkpoint was written.
        drawn: How many batches of the last pass had been read.

    Attributes:
        passes: How often it was started over.
        drawn: How many batches of this pass were read.
    """

    def __init__(self, loader: DataLoader, epoch: int = 0, skipped: int = 0, passes: int = 0, drawn: int = 0) -> None:
        self.passes, self.drawn = passes, drawn
        self._loader = loader
        self._ahead = passes - epoch
        self._skipped = skipped
        self._given: Iterator[Any] | None = None
        self._batches: Iterator[Any] = iter(())

    def place(self) -> dict[str, int]:
        """Give the place, as JSON can hold it."""
        return {"passes": self.passes, "drawn": self.drawn}

    def follow(self, epoch_iterator: Iterator[Any]) -> Stream:
        """Read on from the Trainer's iterator of the running epoch; a new one starts the stream over."""
        if epoch_iterator is self._given:
            return self
        if self._given is None:
            self._batches = self._reopened(epoch_iterator)
        else:
            self.passes, self.drawn = self.passes + 1, 0
            self._batches = epoch_iterator
            if self._ahead:
                self._set_epoch()
        self._given = epoch_iterator
        return self

    def __iter__(self) -> Stream:
        """Give itself."""
        return self

    def __next__(self) -> Any:
        """Give the next batch of this pass."""
        batch = next(self._batches)
        self.drawn += 1
        return batch

    def _reopened(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        """Give the stream from the place on at which the checkpoint was written."""
        if self._ahead:
            # The Trainer counts its epochs by steps and is behind: read this pass with an iterator of our own.
            self._set_epoch()
            epoch_iterator, missing = iter(self._loader), self.drawn
        else:
            missing = self.drawn - self._skipped
            # Less was read than the Trainer skips where a run before this one had ignore_data_skip.
            self.drawn = max(self.drawn, self._skipped)
        if missing > 0:
            with isolated_rng(0):  # what is thrown away must not use up the random numbers of what follows
                deque(itertools.islice(epoch_iterator, missing), maxlen=0)
        return epoch_iterator

    def _set_epoch(self) -> None:
        """Shuffle as this pass does, not as the Trainer's epoch."""
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self.passes)


class Lockstep:
    """Sees to it that all ranks train on the same number of batches; for several ranks only.

    All ranks must make it, at the same point of a run.

    Args:
        loader: This rank's own loader.
        gather: Gives the number of every rank.

    Raises:
        ValueError: The loaders of the ranks differ in length.
    """

    def __init__(self, loader: DataLoader, gather: Callable[[int], list[int]]) -> None:
        self._gather = gather
        stream = isinstance(loader.dataset, IterableDataset)
        lengths = gather(-1 if stream else len(loader))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The train dataloaders of the ranks have {lengths} batches, and all ranks must take as many, or one "
                "waits for the others for ever. Leave it to Trainer to split train_dataset, or cut your loaders to "
                "the same length."
            )
        # One process reads a dispatched stream for all, so it ends for all at once.
        self._apart = stream and not isinstance(loader, DataLoaderDispatcher)
        self._ended: object = None

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
        fewest = min(self._gather(len(batches)))
        if fewest < count:
            self._ended = epoch
            return iter(batches[:fewest])
        return itertools.chain(batches, iterator)
