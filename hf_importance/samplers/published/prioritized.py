r"""Schaul et al., Prioritized Experience Replay, 2015, https://arxiv.org/abs/1511.05952: its proportional variant.

Examples are drawn, with replacement, with :math:`p_i \propto (\ell_i + \epsilon)^\alpha` by their last known loss
:math:`\ell_i`, and weighted with :math:`(N p_i)^{-\beta}` over the largest weight of the batch. At :math:`\beta = 1`
the direction is unbiased; the division makes every step shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_importance.samplers.published import draws
from hf_importance.samplers.sampler import Sampler, Visits
from hf_importance.values import check_range

# ε, so that a fitted example can still be drawn; Schaul et al. leave its size open.
SMALLEST_LOSS = 1e-6


def relative_by_priority(losses: Tensor, exponent: float) -> Tensor:
    """Give the probability of each example, times ``N``; float64, shape ``(N,)``, positive, of mean 1.

    Args:
        losses: Last known loss of each example, NaN while it was never seen; shape ``(N,)``. Unseen counts as the
            largest that is known; a negative loss as 0.
        exponent: α; 0 is uniform.

    >>> relative_by_priority(torch.tensor([1.0, 3.0]), 1.0)
    tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    known = losses[~losses.isnan()]
    largest = float(known.max()) if len(known) else 1.0
    priority = (losses.double().nan_to_num(nan=largest).clamp(min=0) + SMALLEST_LOSS) ** exponent
    return priority / priority.mean()


def correction_weights(relative: Tensor, exponent: float) -> Tensor:
    r"""Give the weights of one optimizer step's examples, :math:`(N p_i)^{-\beta}` over the largest of them.

    Args:
        relative: ``N p`` of the examples drawn, positive, shape ``(n,)``.
        exponent: :math:`\beta`; 1 undoes the preference but for a factor, 0 not at all.
    """
    weights = relative**-exponent
    return weights / weights.max()


@dataclass
class Prioritized(Sampler):
    """Draws by a power of the last known loss; biased while β < 1. The first epoch is the Trainer's own.

    What differs: there it is a replay memory and the TD error (which a ``compute_score_func`` may give), and one
    example of each of ``b`` equal segments of the probability, not independent draws.

    Attributes:
        priority_exponent: α, at least 0; the publication's 0.6.
        correction_exponent: β at the start of training, in ``[0, 1]``; the publication's 0.4. It grows linearly to 1.
        redraw_every: Optimizer steps that one draw covers.
    """

    priority_exponent: float = 0.6
    correction_exponent: float = 0.4
    redraw_every: int = 1

    score = "loss"
    remembers = True

    def __post_init__(self) -> None:
        """Check every value."""
        check_range("priority_exponent", self.priority_exponent, 0, math.inf, "0 draws uniformly.")
        check_range("correction_exponent", self.correction_exponent, 0, 1, "It grows to 1, which is unbiased.")
        draws.check_steps("redraw_every", self.redraw_every)

    @property
    def current_correction(self) -> float:
        """β now."""
        return self.correction_exponent + (1 - self.correction_exponent) * self.run.progress

    def visits(self) -> Visits | None:
        """Draw the next ``redraw_every`` steps."""
        run = self.run
        if draws.knows_nothing(run):
            return None
        micro_batches = draws.micro_batches_of(run, self.redraw_every)
        relative = relative_by_priority(run.table.scores, self.priority_exponent)
        size, generator = micro_batches * run.batch_size * run.ranks, run.generator(run.draws(), 6)
        index = draws.draw_with_replacement(relative, size, generator)
        drawn = relative[index]
        # The batch is that of an optimizer step, over all its micro-batches and ranks.
        batches = drawn.split(run.accumulation * run.batch_size * run.ranks)
        weights = torch.cat([correction_weights(batch, self.current_correction) for batch in batches])
        return Visits(index, weights, micro_batches, represents=1 / drawn)

    def log_entries(self) -> dict[str, float]:
        """Give β, and what the table holds."""
        return {"correction_exponent": self.current_correction, **self.run.table.log_entries(self.run.step())}
