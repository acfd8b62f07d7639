r"""What drawing does to the variance of a gradient, as it is measured on the scores of every step.

A pool of ``B`` examples is scored and the share ``f`` of it kept. The variance factor :math:`\Phi(f) \ge 1` says what
that costs: the weighted mean over the kept examples varies as the mean over :math:`B / \Phi(f)` uniformly drawn ones.
Nothing is lost, :math:`\Phi = 1`, where the examples left out would not have moved the gradient.

*With replacement*, the paper's way, the pool varies by 1/B and the draw from it by 1/(τ² n), both relative to the
second moment of one example's gradient; together :math:`\Phi(f) = 1 + 1 / (\tau^2 f)`.

*Without replacement* an example of the pool is kept with probability :math:`\pi_i = \min(1, c \hat G_i)`, and pool and
draw vary at once:

.. math:: \Phi(f) = \frac{\sum_i \hat G_i^2 / \pi_i}{\sum_i \hat G_i^2}, \qquad \sum_i \pi_i = f B

(Horvitz and Thompson, 1952, with the second moment in place of the variance; independent inclusions, which a
systematic sample in random order is close to.) While no :math:`\pi_i` reaches 1, that is :math:`1 / (\tau^2 f)`: the
pool adds nothing of its own, and the draw alone counts. Once the hard examples are certain, it falls to 1. It depends
on more than τ, so it is measured, share by share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

# Shares at which the factor is measured, 9 % apart; below 1/256 it is taken to grow as 1 / f, as it does for small f.
SHARES = 2.0 ** (np.arange(-64, 1) / 8)


class VarianceFactor(Protocol):
    """A function Φ of the share that is kept, in ``(0, 1]``; falling, and at least 1."""

    def __call__(self, share: np.ndarray | float) -> np.ndarray:
        """Give Φ at one or several shares, in the same shape."""
        ...


class WithReplacement:
    """Φ of drawing with replacement.

    Args:
        tau: What drawing by score is worth, ``>= 1``.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def __call__(self, share: np.ndarray | float) -> np.ndarray:
        """Give ``1 + 1 / (tau**2 * share)``."""
        return 1 + 1 / (self.tau**2 * np.asarray(share))


class WithoutReplacement:
    """Φ of drawing without replacement, from moving averages of the sums of each step's scores.

    The sums are averaged, not their ratios: noise adds up over steps, and most of it comes from the few with the
    hardest examples. Ratios of single steps would keep 10 % more examples than that takes, where most are learnt.

    Args:
        momentum: Share of the old averages that a step keeps, in ``[0, 1)``, as for τ.

    Attributes:
        moments: Averages at :data:`SHARES`, up to a common factor; all zero before the first step.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.moments = np.zeros(len(SHARES))

    def __call__(self, share: np.ndarray | float) -> np.ndarray:
        """Give Φ, between the measured shares on a straight line in logarithms; at first ``1 / share``."""
        share = np.asarray(share)
        if not self.moments[-1] > 0:
            return 1 / share
        factors = np.log(self.moments / self.moments[-1])
        return np.exp(np.interp(np.log(share), np.log(SHARES), factors)) * np.maximum(SHARES[0] / share, 1)

    def average(self, moments: Sequence[float]) -> None:
        """Average in one step.

        Args:
            moments: Sum of :func:`inverse_moments` over the step's pools on all ranks. All zero: nothing is learned.
        """
        if moments[-1] > 0:
            self.moments = self.momentum * self.moments + (1 - self.momentum) * np.asarray(moments)

    def state(self) -> list[float]:
        """Give what a resumed run needs to decide the same, as JSON can hold it."""
        return self.moments.tolist()

    def load(self, state: list[float]) -> None:
        """Take up what :meth:`state` gave."""
        self.moments = np.asarray(state)


def inverse_moments(scores: Tensor, weights: Tensor | None = None) -> np.ndarray:
    r"""Give :math:`\sum_i w_i \hat G_i^2 / \pi_i` at each of :data:`SHARES`, for one pool.

    Args:
        scores: Finite, non-negative, shape ``(B,)``.
        weights: How many examples of a uniform pool each stands for, of mean 1; None: one each; shape ``(B,)``.

    Returns:
        Falling, shape of :data:`SHARES`; the last, where all are kept, is :math:`\sum_i w_i \hat G_i^2`.

    >>> import torch
    >>> moments = inverse_moments(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    >>> bool((moments[SHARES >= 0.25] == 4).all()), round(float(moments[SHARES == 0.125][0]), 6)
    (True, 8.0)
    """
    found = scores.double().numpy()  # where one is not finite, what comes of it is not
    order = np.argsort(-found)
    found = found[order]
    mass = np.ones_like(found) if weights is None else weights.double().numpy()[order]
    # With the k largest certain, the rest shares what is left of the kept ones by score.
    before = np.concatenate([[0.0], np.cumsum(mass)])
    squares = np.concatenate([[0.0], np.cumsum(mass * found**2)])
    remaining = np.append(np.cumsum((mass * found)[::-1])[::-1], 0.0)
    kept = SHARES * before[-1]
    certain = ((kept[:, None] - before[None, :-1]) * found > remaining[None, :-1]).sum(axis=1)
    left = np.maximum(kept - before[certain], np.finfo(float).tiny)
    return squares[certain] + np.where(remaining[certain] > 0, remaining[certain] ** 2 / left, 0.0)
