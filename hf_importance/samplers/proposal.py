r"""What remembered scores are drawn by: calibrated, mixed with the uniform draw, without replacement.

``n`` of ``N`` examples are drawn with probability :math:`\pi_i = \min(1, c\,r_i)`, once at most, in a random order.
:math:`r_i = (1 - \epsilon)\,p_i N + \epsilon` mixes the calibrated proposal ``p`` (:mod:`.calibration`) with the
uniform one, which bounds every weight by :math:`1/\epsilon`. Any part of the draw is a sample with these relative
probabilities, so a step may take as few as the measured gain allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_importance.theory.calibration import CHUNK, Calibration, calibrate
from hf_importance.theory.sampling import inclusion_probabilities

# Draws that an epoch's visits may be split into, and the share of the gain that must not be lost by too few of them.
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
KEPT_GAIN = 0.97


def comb(bins: Callable[[Tensor], Tensor], inclusion: Tensor, order: Tensor, offset: float, rotation: int) -> Tensor:
    """Draw a systematic sample: one comb of unit spacing over the inclusion probabilities, cumulated in ``order``.

    Over random orders, offsets and rotations an example is drawn with its inclusion probability, and each place of
    the result holds it with the same probability. (Without the rotation the first place would not: what comes first
    in an order is any example alike.)

    Args:
        bins: ``bins(index)`` giving the bin of each example, int32; asked for a piece at a time.
        inclusion: Inclusion probability of an example of each bin, float64, shape ``(K,)``, with an integer sum ``n``
            over all examples.
        order: All examples, int32, shape ``(N,)``; written over.
        offset: Position of the comb's first tooth, in ``(0, 1)``, off the ends by more than rounding.
        rotation: By how many places the sample is rotated, in ``[0, n)``.

    Returns:
        The examples drawn, int32, shape ``(n,)``, without repeats.
    """
    count = 0
    for chunk in order.split(CHUNK):
        position = inclusion[bins(chunk)].cumsum(0).add_(offset)
        teeth = position.floor()
        hit = chunk[teeth > torch.cat([teeth.new_tensor([math.floor(offset)]), teeth[:-1]])]
        order[count : count + len(hit)] = hit  # what was drawn never passes what was looked at
        count += len(hit)
        offset = float(position[-1]) % 1.0
    return order[:count].roll(rotation)


class Proposal:
    """The distribution that remembered scores give.

    Args:
        uniform_share: ε, the share of every draw that is uniform, in ``(0, 1]``; weights stay below ``1 / ε``.

    Attributes:
        calibration: What a remembered score says of today's, or None while nothing is known.
        counts: Examples in each of its bins when it was made, int64, shape ``(K,)``.
        relative: ``N`` times the probability of an example of each bin, float64, shape ``(K,)``.
    """

    def __init__(self, uniform_share: float) -> None:
        self.uniform_share = uniform_share
        self.calibration: Calibration | None = None
        self.counts = self.relative = torch.empty(0)

    def refit(self, scores: Tensor, pairs: Tensor) -> None:
        """Calibrate anew; with too few pairs the old calibration stays, for the table as it is now.

        Args:
            scores: The table, shape ``(N,)``.
            pairs: Scores remembered and found, shape ``(m, 2)``.
        """
        found = calibrate(pairs[:, 0].contiguous(), pairs[:, 1].contiguous()) or self.calibration
        if found is not None:
            self.take(found, found.population(scores))

    def take(self, calibration: Calibration, counts: Tensor) -> None:
        """Draw by this calibration from now on, of a table with so many examples in each bin."""
        self.calibration, self.counts = calibration, counts
        mean = float((counts * calibration.levels).sum()) / int(counts.sum())
        even = torch.ones_like(calibration.levels)
        proposal = calibration.levels / mean if mean > 0 else even
        self.relative = (1 - self.uniform_share) * proposal + self.uniform_share * even

    def weights(self, remembered: Tensor) -> Tensor:
        """Give the weights that examples would have if they were drawn now: 1 while nothing is known.

        Over uniformly drawn examples, ``mean(Ĝ²) / mean(w Ĝ²)`` with these is the gain to expect.

        Args:
            remembered: Their scores in the table, shape ``(m,)``.
        """
        if self.calibration is None:
            return torch.ones(len(remembered))
        return (1 / self.relative[self.calibration.bins(remembered)]).float()

    def promised_gain(self, fraction: float) -> float:
        r"""Give the gain that the calibration promises a draw of this share of the examples, in [0, 1]; one at least.

        A place of a draw of n holds example i with probability :math:`\pi_i / n` and the weight
        :math:`w_i = n / (N \pi_i)`, so over all draws the mean of :math:`w^2 s^2` there is that of :math:`w s^2` over
        the table. With the levels as s, the gain is :math:`\sum s_i^2 / \sum w_i s_i^2`. It holds of steps whatever
        part of the draw they are: what drawing without replacement takes off, :math:`\sum s_i^2 / N^2`, is the same
        for a uniform step.

        The longer the draw, the more examples are certain to be in it, and no example is in it twice: a draw of
        everything is uniform sampling, with a gain of 1.
        """
        assert self.calibration is not None
        moments = self.counts * self.calibration.levels.square()
        if not float(moments.sum()) > 0:
            return 1.0
        examples = int(self.counts.sum())
        size = max(round(fraction * examples), 1)
        weights = size / examples / inclusion_probabilities(self.relative, size, self.counts)
        return float(moments.sum() / (moments * weights).sum())

    def splits_for(self, fraction: float) -> int:
        """Give into how many draws the visits of ``fraction * N`` examples are split.

        The fewest that keep nearly all of the gain: a hard example then comes several times while an easy one comes
        once, or not at all.
        """
        best = self.promised_gain(fraction / SPLITS[-1])
        return next(n for n in SPLITS if self.promised_gain(fraction / n) >= KEPT_GAIN * best or n == SPLITS[-1])

    def draw(
        self, scores: Tensor, size: int, generator: torch.Generator, uniform: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw examples.

        Args:
            scores: The table, as it was when this was calibrated; shape ``(N,)``.
            size: How many, ``n``, in ``[1, N]``.
            generator: Source of randomness.
            uniform: Draw all examples alike, with weights of 1.

        Returns:
            The examples in the order of their visits, int32, and their weights, float32, of mean 1 in expectation;
            shape ``(n,)`` each.

        Raises:
            ValueError: Nothing is known to draw by, or there are not so many examples.
        """
        examples, calibration = len(scores), self.calibration
        if calibration is None or size > examples:
            raise ValueError(f"{size} examples cannot be drawn from {examples}.")
        relative = torch.ones_like(self.relative) if uniform else self.relative
        inclusion = inclusion_probabilities(relative, size, self.counts)
        order = torch.randperm(examples, generator=generator, dtype=torch.int32)
        # Off the ends, where rounding could add or lose a tooth.
        offset = 1e-6 + (1 - 2e-6) * float(torch.rand((), generator=generator, dtype=torch.float64))
        rotation = int(torch.randint(size, (), generator=generator))
        index = comb(lambda i: calibration.bins(scores[i]), inclusion, order, offset, rotation)
        assert len(index) == size, (len(index), size)
        weights = [(size / examples / inclusion[calibration.bins(scores[i])]).float() for i in index.split(CHUNK)]
        return index, torch.cat(weights)
