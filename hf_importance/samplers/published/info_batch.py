r"""Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning, 2024.

https://arxiv.org/abs/2303.04947. An example is well learned if its last loss is below the mean of all. An epoch leaves
out each of these with probability ``r``, and those that stay count :math:`1 / (1 - r)`: unbiased over the epoch. In
the last part of training, from the share ``δ`` on, nothing is left out. Losses come from training, at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_importance.samplers.sampler import Sampler, Visits
from hf_importance.values import check_range


@dataclass
class InfoBatch(Sampler):
    """Leaves out a share of the well-learned examples in each epoch, and weighs the others up.

    What differs: an epoch of the publication has fewer steps, here it has as many as ever, with smaller batches, so
    that the schedule stays the Trainer's; weights are divided by their mean, so the sum of an epoch's steps is the
    same.

    Attributes:
        prune: r, in ``[0, 1)``; the publication's 0.5.
        annealing: δ, in ``[0, 1]``; the publication's 0.875.
    """

    prune: float = 0.5
    annealing: float = 0.875

    score = "loss"
    remembers = True

    def __post_init__(self) -> None:
        """Check every value."""
        check_range("prune", self.prune, 0, 1, "The publication has 0.5.", open_high=True)
        check_range("annealing", self.annealing, 0, 1, "The publication has 0.875.")

    def visits(self) -> Visits | None:
        """At the start of an epoch, name what it visits."""
        run, losses = self.run, self.run.table.scores
        if run.place() > 0 or run.step() < run.updates or run.progress >= self.annealing:
            return None
        assert run.examples is not None
        generator = run.generator(run.step(), 8)
        learned = losses < losses.nanmean()
        left_out = learned & (torch.rand(run.examples, generator=generator) < self.prune)
        order = torch.randperm(run.examples, generator=generator)
        index = order[~left_out[order]]
        weights = torch.where(learned[index], 1 / (1 - self.prune), 1.0)
        return Visits(index, weights * (len(index) / run.examples), run.micro_batches_left)
