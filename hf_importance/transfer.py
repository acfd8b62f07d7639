"""Between the host and the device, without a wait for what the device has still to do.

A blocking copy ends when the device has done all that it was given before, and meanwhile it is given nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.random import isolated_rng, key_to_seed


def to_device(value: Any, device: torch.device) -> Any:
    """Give a tensor, or a batch, on the device: through pinned memory, what lies there already as it is."""
    if isinstance(value, Mapping):
        return {name: to_device(entry, device) for name, entry in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor | Mapping) for entry in value):
        return type(value)(to_device(entry, device) for entry in value)
    if not isinstance(value, Tensor) or value.device.type == device.type:
        return value
    if not _has_events(device):
        return value.to(device)
    pinned = value if device.type == "mps" else value.pin_memory()  # torch pins none for it
    return pinned.to(device, non_blocking=True)


def _has_events(device: torch.device) -> bool:
    """Whether a device is one that torch itself can ask how far it is; XLA is none."""
    # torch 2.6 raises where there is none.
    return torch.accelerator.is_available() and device.type == torch.accelerator.current_accelerator().type


@dataclass
class Preparation:
    """Prepares batches that are scored, as the Trainer prepares those that it trains on.

    What is kept of them the Trainer prepares once more. With its own ``_prepare_inputs`` that changes nothing, and
    what lies on the device is not copied. A user's must meet each example that is trained on once, and within the
    batch that is trained on: it may normalise, pad or mix. So rows are then kept of what came in, and what was made of
    it to be scored leaves no trace, in place or in the random state.

    Attributes:
        own: The Trainer's ``_prepare_inputs``.
        overridden: Whether the user's code has a part in it.
        seed: With the key of a batch, of the random numbers of the CPU that it draws.
        device: Where the model is.
    """

    own: Callable[[Any], Any]
    overridden: bool
    seed: int
    device: torch.device

    def __call__(self, batch: Any, *key: int) -> Any:
        """Give what the model takes; ``key``: non-negative."""
        if not self.overridden:
            return self.own(batch)
        with isolated_rng(key_to_seed(self.seed, *key, 11), self.device):
            return self.own(copy.deepcopy(batch))


Mark = float | torch.Event


def mark(device: torch.device) -> Mark:
    """Give a point in time: of the process on a CPU, where other programs do not count, else on the stream."""
    if device.type == "cpu":
        return time.process_time()
    event = torch.Event(device=device, enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Give the seconds from one point to another; it waits for the device to have come to the second."""
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # both, on a CPU
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Fetched:
    """A copy on the host of what is on the device, begun at once and waited for when it is read.

    Args:
        tensors: Of one dimension, of any length; float32 or what it can hold, and at least one of them.

    Attributes:
        sizes: Their lengths.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.sizes = [len(part) for part in tensors]
        # A score of the user's own may lie on the host.
        device = next((part.device for part in tensors if part.device.type != "cpu"), tensors[0].device)
        joined = torch.cat([part.detach().to(device, torch.float32, non_blocking=True) for part in tensors])
        events = _has_events(device)
        self._copy = joined.to("cpu", non_blocking=events)
        self._done: torch.Event | None = None
        if events:
            self._done = torch.Event(device)
            self._done.record()

    def read(self, late: bool = False) -> list[Tensor]:
        """Give the tensors, float64, on the CPU; ``late``: something was read since, so that there is no wait."""
        if self._done is not None and not (late and self._done.query()):
            self._done.synchronize()
        return list(self._copy.double().split(self.sizes))
