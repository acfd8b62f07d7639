r"""Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers, 2019, https://arxiv.org/abs/1910.00762.

Every example passes a forward pass, and is trained on with the probability :math:`F(\ell)^\beta`, with ``F`` the
share of recent losses that are no larger than its own: on average with :math:`1 / (\beta + 1)`. All that are trained
on count alike, so the gradient is biased towards large losses, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import listed, number
from hf_importance.samplers.sampler import Pool, Sampler, Scored
from hf_importance.values import check_range

# Losses are counted in bins, twenty to a factor of ten, so that ranks can add up what they have seen.
EDGES = torch.logspace(-6, 2, 161, dtype=torch.float64)
BINS = len(EDGES) + 1


def counts_of(losses: Tensor) -> Tensor:
    """Count losses by bin; float64, shape ``(BINS,)``."""
    return torch.bincount(torch.bucketize(losses, EDGES), minlength=BINS).double()


@dataclass
class SelectiveBackprop(Sampler):
    """Trains on an example with the probability (percentile of its loss)^β.

    What differs: the publication queues what is chosen until a batch is full. Here each step has a pool of
    ``(β + 1) b``, so that steps and epochs stay the Trainer's: the first ``b`` that are chosen are trained on, and
    where they are fewer, those that came closest to it as well. Its window of past losses is a decaying count by bins,
    over all ranks; the pool's own losses are in it, as there.

    Attributes:
        beta: β, above 0: 1 chooses half of the examples, 2 a third. 2 is recalled, not checked.
        momentum: Share of the counted losses that a step keeps, in ``[0, 1)``.
    """

    beta: float = 2.0
    momentum: float = 0.98

    score = "loss"

    @dataclass
    class State:
        """How often losses were seen lately, by bin."""

        counts: Annotated[list[float], listed(number(0, 1e300), BINS)] = field(default_factory=lambda: [0.0] * BINS)

    def __post_init__(self) -> None:
        """Check every value."""
        check_range("beta", self.beta, 0, math.inf, "2 is the default.", open_low=True)
        check_range("momentum", self.momentum, 0, 1, "It is the share of the old counts; 0.98.", open_high=True)

    def pool(self) -> Pool:
        """Score so many that a batch is chosen on average."""
        size = self.run.batch_size
        return Pool(math.ceil((self.beta + 1) * size), size)

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Choose each by its percentile, in the order in which they come."""
        counts = torch.tensor(self.state.counts, dtype=torch.float64) + counts_of(pool.scores)
        percentiles = (counts.cumsum(0) / counts.sum())[torch.bucketize(pool.scores, EDGES)]
        drawn = torch.rand(len(percentiles), generator=pool.generator, dtype=torch.float64)
        # Below 1 where it is chosen; a loss counts itself, so no percentile is 0.
        missed_by = (drawn / percentiles**self.beta).clamp(min=1)
        rows = missed_by.argsort(stable=True)[: pool.kept]
        return rows, torch.ones(len(rows))

    def measure(self, seen: Scored) -> Sequence[float]:
        """Count the losses."""
        return counts_of(seen.scores).tolist()

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Let the old ones decay."""
        self.state.counts = [self.momentum * old + new for old, new in zip(self.state.counts, sums, strict=True)]
