"""Between the host and the device, without a wait for what the device has still to do.

A blocking copy ends when the device has done all that it was given before, and meanwhile it is given nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Give a tensor, or a batch, on the device: through pinned memory, what lies there already as it is."""
    if isinstance(value, Mapping):
        return {name: to_device(entry, device) for name, entry in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor | Mapping) for entry in value):
        return type(value)(to_device(entry, device) for entry in value)
    if not isinstance(value, Tensor) or value.device.type == device.type:
        return value
    pinned = value if device.type == "mps" else value.pin_memory()  # torch pins none for it
    return pinned.to(device, non_blocking=True)


class Fetched:
    """A copy on the host of what is on the device, begun at once and waited for when it is read.

    Args:
        tensors: Of one dimension, of any length; float32 or what it can hold, and at least one of them.

    Attributes:
        sizes: Their lengths.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.sizes = [len(part) for part in tensors]
        device = tensors[0].device
        joined = torch.cat([part.detach().to(device, torch.float32, non_blocking=True) for part in tensors])
        self._copy = joined.to("cpu", non_blocking=True)
        self._done: torch.Event | None = None
        if device.type != "cpu":
            self._done = torch.Event(device)
            self._done.record()

    def read(self) -> list[Tensor]:
        """Give the tensors, float64, on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return list(self._copy.double().split(self.sizes))
