r"""What a score says of the one that counts: a remembered one of today's, and a pool's of the one in training.

A score ``h`` remembered from the last visit is old. The best probability to draw an example with, given only ``h``,
is proportional to :math:`\sqrt{E[\hat G^2 \mid h]}` with :math:`\hat G` the score that it would get now. That
expectation is estimated from pairs (remembered, found at the visit) of examples visited since: means of squares in
quantile bins, made monotone. Where ``h`` has become worthless the estimate is flat and the draw uniform, so a bad
memory cannot cost anything but the noise of the estimate.

The same holds of a pool, which is scored without dropout and by BatchNorm's running statistics: what the step's noise
is made of are the scores in training. What is kept of pools gives the pairs (scored, in training) at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Fewest pairs in a bin: the mean of 50 squares with a coefficient of variation of 2 is known to a quarter.
PAIRS_PER_BIN = 50
EVEN_BINS = 32
# Half octaves of a pool's score, from 2^-24 up; what is outside counts as the first or the last.
OCTAVES_DOWN, BINS = 24, 64
# Pairs that an estimate goes back to; it starts as if each bin had seen so many in which both scores were alike.
PAIRS_KEPT, ALIKE = 4096, 4
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


def pair_sums(scored: Tensor, found: Tensor) -> list[float]:
    r"""Add up pairs by the half octave of their first score: how many, :math:`\sum s^2`, :math:`\sum t^2`.

    Args:
        scored: Scores of a pool, :math:`s \ge 0`, float64, shape ``(m,)``.
        found: The same examples' in training, :math:`t`. A pair that is not finite is left out.

    Returns:
        ``3 * BINS`` numbers.
    """
    if not len(scored):  # of each uniform step
        return [0.0] * (3 * BINS)
    s, t = scored.numpy(), found.numpy()
    finite = np.isfinite(s) & np.isfinite(t)
    s, t = s[finite], t[finite]
    place = np.log2(np.maximum(s, 2.0**-OCTAVES_DOWN))
    bins = np.clip(2 * (place + OCTAVES_DOWN), 0, BINS - 1).astype(int)
    sums = [np.bincount(bins, w, BINS) for w in (np.ones_like(s), s**2, t**2)]
    return np.concatenate(sums).tolist()


class InTraining:
    r"""What a pool's score says of the one in training: :math:`r(s) = \sqrt{E[t^2 \mid s]}`, rising in ``s``.

    Drawn by ``r``, a pool gives the least noise that can be had from ``s``, and :math:`r^2` in place of :math:`s^2`
    says how much that is (:mod:`.variance`), for the noise of a step is that of its weighted scores in training.
    Where both are alike, ``r`` is ``s``.

    Attributes:
        sums: Of recent pairs, as :func:`pair_sums` gives them.
    """

    def __init__(self) -> None:
        self.sums = [0.0] * (3 * BINS)

    def average(self, sums: Sequence[float]) -> None:
        """Take in pairs, and forget as many of the old ones beyond :data:`PAIRS_KEPT`."""
        new, old = np.asarray(sums), np.asarray(self.sums)
        count = new[:BINS].sum()
        self.sums = (new + max(1 - count / PAIRS_KEPT, 0.0) * old).tolist()

    def __call__(self, scores: Tensor) -> Tensor:
        """Give ``r`` of scores, in the same shape, float64; themselves while there are no pairs."""
        sums = np.asarray(self.sums).reshape(3, BINS)
        if not sums[0].any():
            return scores
        counts, squares, found = sums[:, : int(sums[0].nonzero()[0][-1]) + 1]
        middle = 2.0 ** (np.arange(len(counts)) + 0.5 - 2 * OCTAVES_DOWN)  # square of a bin's middle
        weights = counts + ALIKE
        means = _monotone(torch.from_numpy(found + ALIKE * middle), torch.from_numpy(weights)).numpy()
        points, levels = np.log((squares + ALIKE * middle) / weights) / 2, np.log(means) / 2
        given = scores.double().numpy()
        places = np.log(np.maximum(given, np.finfo(float).tiny))
        beyond = np.maximum(places - points[-1], 0)  # above the last seen in proportion, below the first as in it
        return torch.from_numpy(np.exp(np.interp(places, points, levels) + beyond))
