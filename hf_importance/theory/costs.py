r"""What a step costs: how many examples to score and how many to keep, and whether that pays.

With κ = ``kappa``, the cost of scoring an example over that of training one, a step that scores a pool of ``B`` and
keeps the share ``f`` of it, ``n = f B``, costs :math:`(\kappa + f) B` trained examples. Its gradient varies as that of
a uniform step of :math:`B / \Phi(f)` examples, with the variance factor :math:`\Phi` of :mod:`.variance`. So the noise
of a uniform step costs :math:`\Phi(f)(\kappa + f)` of it, whatever the gain is spent on, and the share that makes this
smallest is the best for every budget:

==================== ============================== ==========================================
budget               what is promised               with the best share f
==================== ============================== ==========================================
``constant_variance`` the noise of a uniform step    B = b Φ(f), n = f B
``constant_time``    the cost of a uniform step     B = b / (κ + f), n = f B
``variance``         n = b                          B = b / f
==================== ============================== ==========================================

Where the share α of a step's time does not shrink with its examples (:mod:`.kappa`), the step costs
:math:`\alpha + (\kappa B + (1 - \alpha) n) / b` uniform ones, and :math:`\kappa / (1 - \alpha)` stands for κ above.

Importance sampling pays where the smallest :math:`\Phi(f)(\kappa + f)` is below 1. Drawn with replacement
:math:`\Phi(f) = 1 + 1/(\tau^2 f)`, and that is where :math:`\sqrt\kappa + 1/\tau < 1`. Left out: the scores are an
upper bound's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_importance.theory.variance import VarianceFactor

Budget = Literal["variance", "constant_variance", "constant_time"]

# The paper's: a backward pass costs two forward passes. Used until it is measured.
ASSUMED_KAPPA = 1 / 3
# A source of examples (pools, memory) takes over where equal noise costs less than this share of what it costs by the
# one at hand, and gives way where it costs more: a price of 0.98 buys nothing, and noise would make it flap.
ON_BELOW, OFF_ABOVE = 0.9, 1.0
# Of an epoch, from one switch to the next at least; of a stream, which has none, optimizer steps.
STAY, STREAM_STAY = 1 / 20, 20
# A pool of 16 batches has a sixteenth of a batch's variance of its own: a larger one buys at most that much.
LARGEST_RATIO = 16
# Shares among which the best is looked for, 1 % apart; a smaller one would keep 1 of 1,024.
CANDIDATES = 2.0 ** (np.arange(-640, 1) / 64)


@dataclass(frozen=True)
class Plan:
    """One step: score ``pool`` examples, keep ``kept`` of them.

    Attributes:
        pool: ``B``, at least the batch.
        kept: ``n``, in ``(0, b]``; a multiple of one over the batches that it is gathered from.
        cost: Predicted, relative to a uniform step: ``(kappa * B + n) / b``, and more where there is an overhead.
    """

    pool: int
    kept: float
    cost: float


def best_share(factor: VarianceFactor, kappa: float) -> tuple[float, float]:
    """Give the share of a pool to keep at which equal noise costs least, and what it costs over a uniform step.

    Args:
        factor: What keeping a share does to the variance.
        kappa: Cost of scoring an example over that of training one, ``> 0``.

    Returns:
        ``f`` in ``(0, 1]``, and ``factor(f) * (kappa + f)``, in ``(kappa, 1 + kappa]``.

    >>> from hf_importance.theory.variance import WithReplacement
    >>> share, price = best_share(WithReplacement(tau=4.0), kappa=1 / 9)
    >>> round(share, 3), round(price, 3)  # sqrt(kappa) / tau, (sqrt(kappa) + 1 / tau)**2
    (0.084, 0.34)
    """
    prices = factor(CANDIDATES) * (kappa + CANDIDATES)
    best = int(prices.argmin())
    return float(CANDIDATES[best]), float(prices[best])


def relative_variance(pool: float, kept: float, batch_size: int, factor: VarianceFactor) -> float:
    """Variance of a step's gradient over that of a uniform step of ``batch_size``, as the rule sees it.

    >>> from hf_importance.theory.variance import WithReplacement
    >>> relative_variance(pool=64, kept=16, batch_size=32, factor=WithReplacement(tau=2.0))
    1.0
    """
    return batch_size / pool * float(factor(kept / pool))


def price(planned: Plan, batch_size: int, factor: VarianceFactor, budget: Budget) -> float:
    """Cost times variance of a step over that of a uniform step: what the same noise costs, below 1 where it pays.

    Less noise than ``"constant_variance"`` promises, and less time than ``"constant_time"`` does, are no gain.
    """
    cost, variance = planned.cost, relative_variance(planned.pool, planned.kept, batch_size, factor)
    if budget == "constant_variance":
        return cost * max(variance, 1.0)
    return max(cost, 1.0) * variance if budget == "constant_time" else cost * variance


def plan(
    budget: Budget,
    batch_size: int,
    factor: VarianceFactor,
    kappa: float,
    ratio: float | None = None,
    margin: float = 1.0,
    overhead: float = 0.0,
    unit: int = 1,
    largest: int | None = None,
    smallest: int = 1,
    gathered: int = 1,
) -> Plan:
    """Say how many examples to score and to keep in one step.

    Args:
        budget: What the gain is spent on: ``"variance"`` (``n = b``, less noise), ``"constant_variance"`` (the noise
            of a uniform step, fewer examples), or ``"constant_time"`` (the cost of a uniform step, less noise).
        batch_size: ``b``, examples in a uniform step.
        factor: What keeping a share of a pool does to the variance.
        kappa: Cost of scoring an example over that of training one, ``> 0``.
        ratio: ``B / b``, if it is given; None: the best one.
        margin: For ``"constant_variance"``: how many times the examples are kept that the estimate asks for, ``>= 1``.
        overhead: α, share of a uniform step's time that does not shrink with its examples, in ``[0, 1)``.
        unit: With the best ratio: ``B`` is ``b`` and a multiple of this many more.
        largest: With the best ratio: ``B`` is at most this.
        smallest: A batch that is trained on holds at least this many, or ``b``.
        gathered: Pools whose kept examples are gathered into as few batches as hold them, at most ``b`` in each.

    Returns:
        The plan; ``n`` is the best one for the ``B`` that rounding and bounds left. With the best ratio, and as much
        noise as a uniform step's, ``B`` is no larger than a bound on ``n`` from below asks for.

    >>> from hf_importance.theory.variance import WithReplacement
    >>> plan("constant_variance", batch_size=32, factor=WithReplacement(tau=4.0), kappa=0.1)
    Plan(pool=57, kept=5.0, cost=0.334375)
    >>> plan("variance", batch_size=32, factor=WithReplacement(tau=4.0), kappa=1 / 3, ratio=3.0)
    Plan(pool=96, kept=32.0, cost=2.0)
    >>> plan("constant_variance", batch_size=8, factor=WithReplacement(tau=4.0), kappa=0.125, gathered=4)
    Plan(pool=14, kept=1.25, cost=0.375)
    """
    overhead /= gathered  # gathered batches are as large as ever, but the last
    # What scoring costs over what an example more or less costs.
    relative = kappa / (1 - overhead)
    if ratio is not None:
        pool = math.ceil(batch_size * ratio)
    else:
        units = max(round((_best_pool(budget, batch_size, factor, relative) - batch_size) / unit), 1)
        pool = batch_size + units * unit
        bound = min(LARGEST_RATIO * batch_size, largest or math.inf)
        if pool > bound:
            pool = batch_size + max(int(bound - batch_size) // unit, 1) * unit
    if budget == "variance":
        kept: float = batch_size
    elif budget == "constant_variance":
        kept = margin * pool * _share_for(factor, pool / batch_size)
        while ratio is None and kept < smallest / gathered and pool - unit > batch_size:
            larger = margin * (pool - unit) * _share_for(factor, (pool - unit) / batch_size)
            if larger > smallest / gathered:
                break
            pool, kept = pool - unit, larger
    else:
        kept = batch_size - relative * pool
    # A share of an example is kept as a whole one where variance is promised, and not where time is.
    whole = math.floor(kept * gathered + 1e-9) if budget == "constant_time" else math.ceil(kept * gathered - 1e-9)
    whole = min(max(whole, 1), batch_size * gathered)
    # Not even the last of the batches that they are gathered in holds fewer than that.
    whole = max(whole, -(-whole // batch_size) * min(smallest, batch_size))
    each = whole / gathered
    return Plan(pool, each, overhead + (kappa * pool + (1 - overhead) * each) / batch_size)


def _best_pool(budget: Budget, batch_size: int, factor: VarianceFactor, kappa: float) -> float:
    share, cheapest = best_share(factor, kappa)
    if budget == "constant_variance":
        return batch_size * cheapest / (kappa + share)
    return batch_size / (kappa + share) if budget == "constant_time" else batch_size / share


def _share_for(factor: VarianceFactor, value: float) -> float:
    """Give the share at which the factor, which falls, is ``value``; 1 where it is so nowhere."""
    falling = -np.log(np.maximum.accumulate(factor(CANDIDATES)[::-1])[::-1])
    return float(np.exp(np.interp(-math.log(value), falling, np.log(CANDIDATES))))
