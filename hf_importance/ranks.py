"""The processes that train together: what crosses the network between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer


class Ranks:
    """One or several processes. On one, nothing crosses any network.

    Args:
        accelerator: Reaches the other ranks.
        tensor_parallel: Processes that share one copy of the model.
        averaged: Whether an item count spans all ranks (``average_tokens_across_devices``), so that a sum divided by
            it must be multiplied by their number again, where gradients are averaged.

    Attributes:
        size: Number of processes, those that share a copy of the model counted once.
        rank: Index of this one.
        averaged: Number of ranks that an item count spans.
    """

    def __init__(self, accelerator: Accelerator, tensor_parallel: int = 1, averaged: bool = True) -> None:
        self._accelerator = accelerator
        self.size = accelerator.num_processes // tensor_parallel
        self.rank = accelerator.process_index
        self.averaged = self.size if averaged else 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all ranks in one collective. All must call it, with as many."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        return self._accelerator.reduce(tensor, "sum").tolist()  # pyrefly: ignore[missing-attribute]

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate rows over all ranks, of which each may have another number; on the CPU. All must call it.

        Args:
            rows: Shape ``(m, columns)``; the first column is never negative.
        """
        if self.size == 1:
            return rows
        padded = self._accelerator.pad_across_processes(rows.to(self._accelerator.device), dim=0, pad_index=-1)
        gathered = self._accelerator.gather(padded).cpu()
        return gathered[gathered[:, 0] >= 0]

    def gather_number(self, value: int) -> list[int]:
        """Give the number of every rank. All must call it."""
        if self.size == 1:
            return [value]
        return self._accelerator.gather(torch.tensor([value], device=self._accelerator.device)).tolist()


def ranks_of(trainer: Trainer) -> Ranks:
    """Give the processes that a trainer knows of."""
    return Ranks(trainer.accelerator, trainer.get_tp_size(), trainer.args.average_tokens_across_devices)
