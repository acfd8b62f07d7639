"""One optimizer step: what it does and what it finds, dropped if it is not finished; and what steps add up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import COUNT, number
from hf_importance.reporting.report import Totals
from hf_importance.run.feed import FeedState
from hf_importance.samplers.sampler import Scored


_SUM = number(0, 1e300)


@dataclass
class RunState:
    """What steps change, whatever the sampler; it goes into the checkpoint."""

    tau: Annotated[float, number(1 - 1e-6, 1e9)] = 1.0  # moving average of τ: at first nothing to win
    switches: Annotated[int, COUNT] = 0
    steps_on: Annotated[int, COUNT] = 0  # optimizer steps drawn by importance
    drawn: bool = False  # whether the last step was
    items: Annotated[float, _SUM] = 0.0  # of the loss, in uniform steps and pools since the start
    examples: Annotated[float, _SUM] = 0.0  # examples in them


@dataclass
class Step:
    """A step in progress, or done and not committed yet.

    Attributes:
        number: Optimizer steps before it.
        kind: ``"batch"`` (the Trainer's own), ``"visits"`` or ``"pool"``.
        drawn: Whether it is drawn by importance.
        place: Where reading stands behind it.
        counts: What it trains on and scores, on this rank.
        given: Of visits: their weights, shape ``(m,)``.
        represents: Of visits: how many uniformly drawn examples each stands for, shape ``(m,)``.
        outputs: What its training passes left on the device, of each micro-batch: scores, indices, item count.
        pool: Of a pool: what was scored.
        trained: Of a pool: for each of its examples the weight that it is trained with, 0 if it is not.
        sums: Of a pool: the figures over all ranks, see ``Run.commit``.
    """

    number: int
    kind: str
    drawn: bool = False
    place: FeedState | None = None
    counts: Totals = field(default_factory=Totals)
    given: Tensor | None = None
    represents: Tensor | None = None
    outputs: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    pool: Scored | None = None
    trained: Tensor | None = None
    sums: list[float] | None = None

    def read(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Give scores and indices of what was trained on, and the item count of each micro-batch; on the CPU.

        The one wait for the device of a uniform step.
        """
        sizes = [len(scores) for scores, _, _ in self.outputs]
        host: Any = torch.cat([*(s for s, _, _ in self.outputs), *(i.float()[None] for _, _, i in self.outputs)])
        scores, items = host.cpu().double().split([sum(sizes), len(sizes)])
        indices = [index for _, index, _ in self.outputs if index is not None]
        return scores, torch.cat(indices).cpu() if indices else None, items
