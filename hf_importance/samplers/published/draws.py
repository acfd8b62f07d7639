"""What the methods share that draw every few steps, with replacement, by the last known loss of each example."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_importance.samplers.sampler import Facts


def knows_nothing(run: Facts) -> bool:
    """Whether the first epoch, the Trainer's own, still fills the table, or a resumed run begins without one."""
    return run.step() < run.updates or bool(run.table.scores.isnan().all())


def micro_batches_of(run: Facts, updates: int) -> int:
    """Give the micro-batches of so many optimizer steps, or of what is left of the epoch."""
    return min(updates * run.accumulation, run.micro_batches_left)


def draw_with_replacement(relative: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` examples independently, each in proportion to ``relative``.

    By the inverse of the cumulated probabilities: ``torch.multinomial`` takes no more than 2^24 examples.

    Returns:
        Int64, shape ``(size,)``, with repeats.
    """
    cumulated = relative.cumsum(0)
    places = torch.rand(size, generator=generator, dtype=torch.float64) * cumulated[-1]
    return torch.searchsorted(cumulated, places, right=True).clamp(max=len(relative) - 1)


def check_steps(name: str, value: int | None) -> None:
    """Refuse what is no number of optimizer steps; None is one.

    Raises:
        ValueError: It is none.
    """
    if value is not None and not (type(value) is int and value >= 1):
        raise ValueError(f"{name} must be at least 1 optimizer step, and an integer, but it is {value!r}.")
