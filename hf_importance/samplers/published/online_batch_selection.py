r"""Loshchilov and Hutter, Online Batch Selection for Faster Training of Neural Networks, 2015.

https://arxiv.org/abs/1511.06343. The ``N`` examples are ranked by their last known loss, the largest first, and the
i-th is drawn, with replacement, with a probability in proportion to :math:`\exp(-\log(s)\,i / N)`: the first ``s``
times as often as the last. There are no weights: what is descended is another loss, in which hard examples count more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_importance.samplers.published import draws
from hf_importance.samplers.sampler import Sampler, Visits
from hf_importance.values import check_range


def relative_by_rank(losses: Tensor, pressure: float, order: Tensor) -> Tensor:
    r"""Give the probability of each example, times ``N``.

    Args:
        losses: Last known loss of each example, NaN while it was never seen; shape ``(N,)``. Unseen ranks first.
        pressure: :math:`s`, at least 1.
        order: A permutation of the examples, int64, shape ``(N,)``; equal losses are ranked in this order.

    Returns:
        Shape ``(N,)``, float64, of mean 1.

    >>> relative_by_rank(torch.tensor([0.1, 3.0]), 4.0, torch.arange(2))
    tensor([0.6667, 1.3333], dtype=torch.float64)
    """
    examples = len(losses)
    known = torch.where(losses.isnan(), torch.inf, losses)
    ranked = order[known[order].argsort(descending=True, stable=True)]
    ranks = torch.arange(1, examples + 1, dtype=torch.float64)
    by_rank = torch.as_tensor(pressure, dtype=torch.float64) ** (-ranks / examples)
    relative = torch.empty(examples, dtype=torch.float64)
    relative[ranked] = by_rank / by_rank.mean()
    return relative


@dataclass
class OnlineBatchSelection(Sampler):
    """Draws by the rank of the last known loss; biased. The first epoch is the Trainer's own and fills the table.

    What differs: the publication renews a part of the losses at a falling rate, here it is all of them at a constant
    one; equal losses are ranked at random, anew in each draw.

    Attributes:
        pressure: ``s`` at the start of training, at least 1; 100 is ours.
        final_pressure: ``s`` at its end, at least 1; it falls exponentially.
        redraw_every: Optimizer steps that one draw covers. Each draw sorts the whole table.
        recompute_every: Optimizer steps between two forward passes over the whole training set, which renew all
            losses; None: those of the last visits.
    """

    pressure: float = 100.0
    final_pressure: float = 1.0
    redraw_every: int = 1
    recompute_every: int | None = None

    score = "loss"
    remembers = True

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("pressure", "final_pressure"):
            check_range(name, getattr(self, name), 1, math.inf, "1 draws uniformly.")
        draws.check_steps("redraw_every", self.redraw_every)
        draws.check_steps("recompute_every", self.recompute_every)

    @property
    def current_pressure(self) -> float:
        """``s`` now."""
        return self.pressure * (self.final_pressure / self.pressure) ** self.run.progress

    def visits(self) -> Visits | None:
        """Draw the next ``redraw_every`` steps, fewer where a recomputation comes before."""
        run, updates, every = self.run, self.redraw_every, self.recompute_every
        if draws.knows_nothing(run):
            return None
        if every is not None:
            updates = min(updates, every - run.step() % every)
            if run.step() % every == 0:
                run.score_all()
        assert run.examples is not None
        micro_batches, generator = draws.micro_batches_of(run, updates), run.generator(run.draws(), 6)
        order = torch.randperm(run.examples, generator=generator)
        relative = relative_by_rank(run.table.scores, self.current_pressure, order)
        index = draws.draw_with_replacement(relative, micro_batches * run.batch_size * run.ranks, generator)
        return Visits(index, torch.ones(len(index)), micro_batches, represents=1 / relative[index])

    def log_entries(self) -> dict[str, float]:
        """Give the pressure, and what the table holds."""
        return {"selection_pressure": self.current_pressure, **self.run.table.log_entries(self.run.step())}
