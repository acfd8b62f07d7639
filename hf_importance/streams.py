"""How far a streaming dataset was read, so that a resumed run goes on behind it.

The Trainer skips the batches that were trained on. While importance sampling is on, a step reads the rest of its pool
from the same stream, so more must be skipped, and the stream ends sooner and is started over more often than the
Trainer can tell from the steps.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from hf_importance.batches import isolated_rng


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
