r"""How much importance sampling is worth: τ.

Two conventions of τ are in circulation. This package uses the one with the square root, as the authors' code computes
it and as Algorithm 1 has it; the variance falls by τ², so ``tau ** 2`` is the equivalent batch-size multiplier
(``batch_size_gain``). A threshold of 1.5 here is one of 2.25 in the convention without the root.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def estimate_tau(scores: Tensor) -> Tensor:
    r"""How much sampling by score is worth over sampling uniformly.

    With ``g = scores / scores.sum()`` over ``B`` examples::

        tau = (1 - sum((g - 1/B)**2) / sum(g**2)) ** -0.5 = sqrt(B * sum(g**2))

    A gradient estimated from ``b`` examples drawn by ``g`` has the variance of one from about ``tau**2 * b`` uniform
    ones.

    Args:
        scores: Non-negative importance of each example, any positive scale; shape ``(B,)``.

    Returns:
        Scalar in ``[1, sqrt(B)]``, dtype of ``scores``: 1 for equal scores, ``sqrt(B)`` when one example holds all.

    Raises:
        ValueError: ``scores`` is not a vector or is empty.

    Note:
        All-zero scores mean that every example is already fitted; they give 1 (stay uniform), not NaN. A non-finite
        score gives NaN: the caller decides what to do with it.

    Reference:
        Katharopoulos and Fleuret, 2018, https://arxiv.org/abs/1803.00942, eq. 29 and Algorithm 1.

    >>> estimate_tau(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    tensor(1.)
    >>> estimate_tau(torch.tensor([0.0, 5.0, 0.0, 0.0]))
    tensor(2.)
    """
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"scores must be a vector with at least one entry, but their shape is {tuple(scores.shape)}.")
    largest = scores.max()
    scaled = torch.where(largest > 0, scores / largest, torch.ones_like(scores))
    return (len(scores) * scaled.square().sum()).sqrt() / scaled.sum()


def tau_from_sums(count: float, total: float, total_of_squares: float) -> float:
    """Give :func:`estimate_tau` from what ranks can add up: how many scores, their sum, that of their squares.

    Returns:
        τ in ``[1, sqrt(count)]``; 1 for no scores or only zeros; NaN where a sum is not finite.

    >>> tau_from_sums(4, 5.0, 25.0)
    2.0
    """
    if not (math.isfinite(total) and math.isfinite(total_of_squares)):
        return math.nan
    if total <= 0:
        return 1.0
    # Rounding can bring equal scores a hair below 1.
    return max(math.sqrt(count * total_of_squares) / total, 1.0)


def derived_threshold(presample_ratio: float) -> float:
    """τ above which presampling pays when a backward pass costs two forward passes, ``(B + 3b) / (3b)``.

    Reference:
        Katharopoulos and Fleuret, 2018, https://arxiv.org/abs/1803.00942, section 3.3, below eq. 29.

    >>> derived_threshold(3.0)
    2.0
    """
    return (presample_ratio + 3) / 3
