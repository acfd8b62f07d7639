r"""What a remembered score still says about today's: the proposal of the history method.

A score ``h`` remembered from the last visit is old. The best probability to draw an example with, given only ``h``,
is proportional to :math:`\sqrt{E[\hat G^2 \mid h]}` with :math:`\hat G` the score that it would get now. That
expectation is estimated from pairs (remembered, found at the visit) of examples visited since: means of squares in
quantile bins, made monotone. Where ``h`` has become worthless the estimate is flat and the draw uniform, so a bad
memory cannot cost anything but the noise of the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Fewest pairs in a bin: the mean of 50 squares with a coefficient of variation of 2 is known to a quarter.
PAIRS_PER_BIN = 50
EVEN_BINS = 32
CHUNK = 1 << 18  # examples handled at a time: tables of millions need no temporary of their own size


@dataclass(frozen=True)
class Calibration:
    """A step function of the remembered score.

    Attributes:
        edges: Where one bin ends and the next begins, ascending; float32, shape ``(K - 1,)``.
        levels: Root of the expected squared score of each bin, non-decreasing; float64, shape ``(K,)``.
    """

    edges: Tensor
    levels: Tensor

    def bins(self, remembered: Tensor) -> Tensor:
        """Give the bin of each remembered score; an example not seen yet (NaN) counts as the largest seen."""
        return torch.bucketize(remembered.nan_to_num(nan=torch.inf), self.edges, right=True, out_int32=True)

    def population(self, remembered: Tensor) -> Tensor:
        """Count the examples in each bin; int64, shape ``(K,)``."""
        counts = torch.zeros(len(self.levels), dtype=torch.int64)
        for chunk in remembered.split(CHUNK):
            counts += torch.bincount(self.bins(chunk), minlength=len(counts))
        return counts


def calibrate(remembered: Tensor, found: Tensor) -> Calibration | None:
    r"""Estimate :math:`\sqrt{E[\hat G^2 \mid h]}` from pairs, monotone in ``h``.

    The pairs may come from any draw whose probabilities depend on ``h`` alone: within a bin they are a fair sample.

    Args:
        remembered: What was remembered of each example before its visit, finite; shape ``(m,)``.
        found: What the visit found, finite; shape ``(m,)``.

    Returns:
        The step function, or None for too few pairs (fewer than ``4 * PAIRS_PER_BIN``) or nothing but zeros.
    """
    pairs = len(remembered)
    if pairs < 4 * PAIRS_PER_BIN or not bool((found > 0).any()):
        return None
    bins = min(EVEN_BINS, pairs // PAIRS_PER_BIN)
    levels = [k / bins for k in range(1, bins)]
    # The heavy tail carries most of the squares: halve the last bin for as long as the halves hold enough.
    tail = 1 / (2 * bins)
    while pairs * tail >= PAIRS_PER_BIN:
        levels.append(1 - tail)
        tail /= 2
    ordered = remembered.sort().values
    ranks = (torch.tensor(levels, dtype=torch.float64) * pairs).long()
    edges = ordered[ranks].unique()
    unfitted = Calibration(edges, torch.zeros(len(edges) + 1, dtype=torch.float64))
    index = unfitted.bins(remembered).long()
    counts = torch.bincount(index, minlength=len(edges) + 1).double()
    squares = torch.zeros_like(counts).index_add_(0, index, found.double().square())
    return Calibration(edges, _monotone(squares, counts).sqrt())


def _monotone(totals: Tensor, counts: Tensor) -> Tensor:
    """Give the non-decreasing means closest to ``totals / counts``, weighted by ``counts`` (pool adjacent violators).

    Reference:
        Barlow, Bartholomew, Bremner and Brunk, Statistical Inference under Order Restrictions, 1972.
    """
    blocks: list[list[float]] = []  # total, count, number of bins
    for total, count in zip(totals.tolist(), counts.tolist(), strict=True):
        blocks.append([total, count, 1])
        # An empty bin takes the mean of its neighbour.
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    means = [total / count if count else 0.0 for total, count, _ in blocks]
    repeats = torch.tensor([int(bins) for _, _, bins in blocks])
    return torch.tensor(means, dtype=torch.float64).repeat_interleave(repeats)
