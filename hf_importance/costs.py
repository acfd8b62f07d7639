r"""What a step costs: how many examples to score and how many to keep, and from which τ on it pays.

With κ = ``kappa``, the cost of scoring an example over that of training one, and τ = ``tau`` (root convention), a step
that scores a pool of ``B`` and keeps ``n`` costs :math:`\kappa B + n` trained examples. Relative to the second moment
of one example's gradient its variance is :math:`1/B + 1/(\tau^2 n)`, that of the pool itself and that of drawing from
it; a uniform step of ``b`` has the cost ``b`` and the variance :math:`1/b`. For each budget the best ``B / n`` is
:math:`\tau / \sqrt\kappa`, and cost times variance, relative to the uniform step, is :math:`(\sqrt\kappa + 1/\tau)^2`:

==================== ==================================================== ==========================================
budget               what is minimised                                    with the best B
==================== ==================================================== ==========================================
``constant_variance`` κB + n, subject to 1/B + 1/(τ² n) = 1/b             B = b (1 + 1/(τ√κ)), n = b (√κ/τ + 1/τ²)
``constant_time``    1/B + 1/(τ² n), subject to κB + n = b                B = b / (κ + √κ/τ), n = b / (1 + τ√κ)
``variance``         cost times variance, subject to n = b                B = b τ/√κ, n = b
==================== ==================================================== ==========================================

So importance sampling pays exactly where :math:`\sqrt\kappa + 1/\tau < 1`. What the formulas leave out: τ is an
estimate of an upper bound's, and examples drawn without replacement vary less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Budget = Literal["variance", "constant_variance", "constant_time"]

# The paper's: a backward pass costs two forward passes. Used until it is measured.
ASSUMED_KAPPA = 1 / 3
# A source of examples takes over where it is cheaper by this factor, and stays while it is not dearer.
HYSTERESIS = 1.05
# A pool of 16 batches has a sixteenth of a batch's variance of its own: a larger one buys at most that much.
LARGEST_RATIO = 16


@dataclass(frozen=True)
class Plan:
    """One step: score ``pool`` examples, keep ``kept`` of them.

    Attributes:
        pool: ``B``, at least the batch.
        kept: ``n``, in ``[1, b]``.
        cost: Predicted, relative to a uniform step: ``(kappa * B + n) / b``.
    """

    pool: int
    kept: int
    cost: float


def pays_above(kappa: float, cost: float = 1.0) -> float:
    """τ above which equal gradient noise costs less than ``cost`` uniform steps, ``1 / (sqrt(cost) - sqrt(kappa))``.

    Args:
        kappa: Cost of scoring an example over that of training one, ``> 0``.
        cost: What it may cost, relative to a uniform step.

    Returns:
        Above 1; infinite where scoring alone costs too much.

    >>> round(pays_above(1 / 3), 2), round(pays_above(0.1), 2), pays_above(1.0)
    (2.37, 1.46, inf)
    """
    room = math.sqrt(cost) - math.sqrt(kappa)
    return 1 / room if room > 0 else math.inf


def relative_variance(pool: float, kept: float, batch_size: int, tau: float) -> float:
    """Variance of a step's gradient over that of a uniform step of ``batch_size``, as the rule sees it.

    >>> relative_variance(pool=64, kept=16, batch_size=32, tau=2.0)
    1.0
    """
    return batch_size / pool + batch_size / (tau**2 * kept)


def price(planned: Plan, batch_size: int, tau: float) -> float:
    """Cost times variance of a step over that of a uniform step: what the same noise costs, below 1 where it pays.

    For the best plan it is ``(sqrt(kappa) + 1 / tau) ** 2``.

    >>> round(price(plan("variance", 32, tau=4.0, kappa=1 / 9), 32, tau=4.0), 4), round((1 / 3 + 1 / 4) ** 2, 4)
    (0.3403, 0.3403)
    """
    return planned.cost * relative_variance(planned.pool, planned.kept, batch_size, tau)


def plan(
    budget: Budget,
    batch_size: int,
    tau: float,
    kappa: float,
    ratio: float | None = None,
    margin: float = 1.0,
    unit: int = 1,
    largest: int | None = None,
    smallest: int = 1,
) -> Plan:
    """Say how many examples to score and to keep in one step.

    Args:
        budget: What the gain is spent on: ``"variance"`` (``n = b``, less noise), ``"constant_variance"`` (the noise
            of a uniform step, fewer examples), or ``"constant_time"`` (the cost of a uniform step, less noise).
        batch_size: ``b``, examples in a uniform step.
        tau: What drawing by score is worth, ``>= 1``.
        kappa: Cost of scoring an example over that of training one, ``> 0``.
        ratio: ``B / b``, if it is given; None: the best one.
        margin: For ``"constant_variance"``: how many times the examples are kept that the estimate asks for, ``>= 1``.
        unit: With the best ratio: ``B`` is ``b`` and a multiple of this many more.
        largest: With the best ratio: ``B`` is at most this.
        smallest: ``n`` is at least this.

    Returns:
        The plan; ``n`` is the best one for the ``B`` that rounding and bounds left.

    >>> plan("constant_variance", batch_size=32, tau=4.0, kappa=0.1)
    Plan(pool=57, kept=5, cost=0.334375)
    >>> plan("variance", batch_size=32, tau=4.0, kappa=1 / 3, ratio=3.0)
    Plan(pool=96, kept=32, cost=2.0)
    """
    pool = math.ceil(batch_size * ratio) if ratio is not None else _best_pool(budget, batch_size, tau, kappa)
    if ratio is None:
        units = max(round((pool - batch_size) / unit), 1)
        pool = batch_size + units * unit
        bound = min(LARGEST_RATIO * batch_size, largest or math.inf)
        if pool > bound:
            pool = batch_size + max(int(bound - batch_size) // unit, 1) * unit
    if budget == "variance":
        kept: float = batch_size
    elif budget == "constant_variance":
        # 1/B + 1/(tau² n) = 1/b, solved for n. A pool no larger than the batch leaves nothing to draw from.
        room = 1 - batch_size / pool
        kept = margin * batch_size / (tau**2 * room) if room > 0 else batch_size
    else:
        kept = batch_size - kappa * pool
    # A share of an example is kept as a whole one where variance is promised, and not where time is.
    whole = math.floor(kept + 1e-9) if budget == "constant_time" else math.ceil(kept - 1e-9)
    whole = min(max(whole, smallest, 1), batch_size)
    return Plan(pool, whole, (kappa * pool + whole) / batch_size)


def _best_pool(budget: Budget, batch_size: int, tau: float, kappa: float) -> float:
    root = math.sqrt(kappa)
    if budget == "constant_variance":
        return batch_size * (1 + 1 / (tau * root))
    if budget == "constant_time":
        return batch_size / (kappa + root / tau)
    return batch_size * tau / root
