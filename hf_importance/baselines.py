r"""Published rivals that draw by the last known loss of each example, as functions: labelled baselines, not advice.

*Online batch selection* (Loshchilov & Hutter, 2015, https://arxiv.org/abs/1511.06343) ranks the ``N`` examples by
their last known loss, the largest first. The i-th is drawn with a probability in proportion to
:math:`\exp(-\log(s)\, i / N)`, so the first :math:`s` times as often as the last. There are no weights: what is
descended is another loss, in which hard examples count more.

*Prioritized sampling* (Schaul et al., 2015, https://arxiv.org/abs/1511.05952, its proportional variant) draws with
:math:`p_i \propto (\ell_i + \epsilon)^\alpha` and weighs with :math:`(N p_i)^{-\beta}` over the largest weight of the
batch. At :math:`\beta = 1` the direction is unbiased; the division makes every step shorter.

Both draw with replacement. Notation: ``relative`` is :math:`N p_i`, of mean 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is added to every loss, so that a fitted example can still be drawn; Schaul et al. leave its size open.
SMALLEST_LOSS = 1e-6


def selection_pressure(start: float, end: float, progress: float) -> float:
    """How much more often the first rank is drawn than the last: exponentially from ``start`` to ``end``.

    Args:
        start: Pressure at the start of training, at least 1.
        end: Pressure at its end, at least 1.
        progress: Share of the optimizer steps that are done, in ``[0, 1]``.

    >>> selection_pressure(100.0, 1.0, 0.5)
    10.0
    """
    return start * (end / start) ** progress


def relative_by_rank(losses: Tensor, pressure: float, order: Tensor) -> Tensor:
    r"""Probability of each example under online batch selection, times ``N``.

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


def relative_by_priority(losses: Tensor, exponent: float) -> Tensor:
    r"""Probability of each example under proportional prioritisation, times ``N``.

    Args:
        losses: Last known loss of each example, NaN while it was never seen; shape ``(N,)``. Unseen counts as the
            largest that is known; a negative loss as 0.
        exponent: :math:`\alpha`; 0 is uniform.

    Returns:
        Shape ``(N,)``, float64, positive, of mean 1.

    >>> relative_by_priority(torch.tensor([1.0, 3.0]), 1.0)
    tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    known = losses[~losses.isnan()]
    largest = float(known.max()) if len(known) else 1.0
    priority = (losses.double().nan_to_num(nan=largest).clamp(min=0) + SMALLEST_LOSS) ** exponent
    return priority / priority.mean()


def annealed(start: float, progress: float) -> float:
    """Give the correction exponent β: linearly from ``start`` to 1.

    >>> annealed(0.4, 0.5)
    0.7
    """
    return start + (1 - start) * progress


def correction_weights(relative: Tensor, exponent: float) -> Tensor:
    r"""Weights of one optimizer step's examples, :math:`(N p_i)^{-\beta}` over the largest of them.

    Args:
        relative: ``N p`` of the examples drawn, positive, shape ``(n,)``.
        exponent: :math:`\beta`; 1 undoes the preference but for a factor, 0 not at all.

    Returns:
        Shape ``(n,)``, in ``(0, 1]``.
    """
    weights = relative**-exponent
    return weights / weights.max()


def draw_with_replacement(relative: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` examples independently, each in proportion to ``relative``.

    By the inverse of the cumulated probabilities: ``torch.multinomial`` takes no more than 2^24 examples.

    Returns:
        Int64, shape ``(size,)``, with repeats.
    """
    cumulated = relative.cumsum(0)
    places = torch.rand(size, generator=generator, dtype=torch.float64) * cumulated[-1]
    return torch.searchsorted(cumulated, places, right=True).clamp(max=len(relative) - 1)
