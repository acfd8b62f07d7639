r"""Scores remembered at no cost: a table of one score per training example, and passes drawn by it.

Every training forward pass gives the scores of the examples in it for free. Remembered, they are the proposal for the
next visit. Importance weights come from the probabilities actually used, so the gradient stays unbiased however old
the scores are; age costs only efficiency, and that is measured.

A *pass* visits each of ``N`` examples with probability :math:`\pi_i = \min(1, c\,r_i)`, once at most, in a random
order. :math:`r_i = (1 - \epsilon)\,p_i N + \epsilon` mixes the calibrated proposal ``p`` (:mod:`.calibration`) with
the uniform one, which bounds every weight by :math:`1/\epsilon`. Any ``n`` examples in a row of a pass are a sample
with these relative probabilities, so a step may take as few as the measured gain allows:

.. math:: \text{gain} = \frac{E[w \hat G^2]}{E[w^2 \hat G^2]}

over the examples visited, with weights ``w`` of mean 1: the second moment of a uniformly drawn gradient over that of
the one drawn here. ``n = b / gain`` examples have the noise of ``b`` uniform ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_importance.batches import key_to_seed
from hf_importance.calibration import CHUNK, Calibration, calibrate
from hf_importance.sampling import inclusion_probabilities

TABLE = ("scores", "seen", "visits", "weight_sum")
# Pairs that a calibration is estimated from, at most; 2 MB. More would not sharpen 32 bins.
PAIRS = 1 << 18
# Passes that an epoch's visits may be split into, and the share of the gain that must not be lost by too few of them.
PASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
KEPT_GAIN = 0.97
SMALLEST_FRACTION = 1 / 16  # of the uniform batch; below, a step's own noise estimate means little


def draw_pass(
    bins: Callable[[Tensor], Tensor], inclusion: Tensor, order: Tensor, offset: float, rotation: int
) -> Tensor:
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


@dataclass
class Pass:
    """The part of a run between two draws.

    Attributes:
        index: Examples in the order of their visits, over all ranks; int32, shape ``(n,)``.
        weights: Their importance weights, of mean 1 in expectation; float32, shape ``(n,)``.
        batch_size: Examples of a micro-batch on each rank, on average; at least 1. Sizes differ by one at most.
        length: Micro-batches.
        number: Passes drawn before this one.
        uniform: Whether it was drawn uniformly, because nothing else would have gained.
        position: Micro-batches handed out.
        inverse: Inverse probabilities of the visits over their mean, where the weights are others; float32, shape
            ``(n,)``.
    """

    index: Tensor
    weights: Tensor
    batch_size: float
    length: int
    number: int
    uniform: bool = False
    position: int = 0
    inverse: Tensor | None = None

    @property
    def undoing(self) -> Tensor:
        """Weights of mean 1 that sums over all examples are estimated with."""
        return self.weights if self.inverse is None else self.inverse

    def rows(self, micro: int, rank: int, ranks: int) -> slice:
        """Give where in the pass a rank's examples of one micro-batch are."""
        start, end = (math.floor(m * self.batch_size) * ranks for m in (micro, micro + 1))
        return slice(start + rank, end, ranks)


@dataclass
class Averages:
    """Moving sums over recent steps, and what they say; they go into the checkpoint."""

    count: float = 0.0  # examples that the two sums below stand for
    uniform_moment: float = 0.0  # Σ w Ĝ²
    drawn_moment: float = 0.0  # Σ w² Ĝ²
    items: float = 0.0  # items of the loss in uniform steps since the start
    examples: float = 0.0  # examples in them

    def add(self, count: float, uniform_moment: float, drawn_moment: float, keep: float) -> None:
        """Average in one step, of which later ones keep the share ``keep``."""
        self.count = keep * self.count + count
        self.uniform_moment = keep * self.uniform_moment + uniform_moment
        self.drawn_moment = keep * self.drawn_moment + drawn_moment

    @property
    def gain(self) -> float:
        """Second moment of uniform sampling over that of this proposal; 1 while nothing is known."""
        return self.uniform_moment / self.drawn_moment if self.drawn_moment > 0 else 1.0


@dataclass
class History:
    """Table, calibration and passes; the same on every rank.

    Attributes:
        examples: Training examples, ``N``.
        seed: What draws are keyed by.
        uniform_share: ε, the share of every draw that is uniform, in ``(0, 1]``; weights stay below ``1 / ε``.
        scores: Last score of each example, NaN while it was never seen; float32, shape ``(N,)``.
        seen: Optimizer step of its last visit; int32, shape ``(N,)``.
        visits: In how many batches it was trained on, at most 65,535; uint16, shape ``(N,)``.
        weight_sum: Sum of the importance weights that it had; float32, shape ``(N,)``.
        calibration: What is drawn by, or None while nothing is known.
        passes: Passes drawn since the start.
        skipped_share: Share of the examples that the last pass did not visit.
    """

    examples: int
    seed: int
    uniform_share: float
    averages: Averages = field(default_factory=Averages)
    calibration: Calibration | None = None
    current: Pass | None = None
    passes: int = 0
    skipped_share: float = 0.0

    def __post_init__(self) -> None:
        """Make the empty table."""
        self.scores = torch.full((self.examples,), torch.nan)
        self.seen = torch.zeros(self.examples, dtype=torch.int32)
        self.visits = torch.zeros(self.examples, dtype=torch.uint16)
        self.weight_sum = torch.zeros(self.examples)
        # A ring: row k % len(ring) holds the k-th pair (remembered, found).
        self._pairs = torch.full((min(PAIRS, max(self.examples, 1024)), 2), torch.nan)
        self._paired = 0
        self._counts = torch.empty(0)
        self._relative = torch.empty(0)

    # ---- Remember ----

    def record(self, index: Tensor, found: Tensor, step: Tensor, weights: Tensor) -> None:
        """Put scores into the table, and the pairs (remembered, found) aside for the next calibration.

        Args:
            index: Examples, in the order of their visits; int64, shape ``(m,)``.
            found: Their scores; a non-finite one is not remembered; float32, shape ``(m,)``.
            step: Optimizer step of each visit; int32, shape ``(m,)``.
            weights: Importance weight of each visit, 1 where it was drawn uniformly, 0 where an example was only
                scored; float32, shape ``(m,)``.
        """
        # Of an example visited twice NumPy adds both, and keeps the last score; torch promises neither.
        np.add.at(self.visits.numpy(), index.numpy(), (weights > 0).numpy().astype(np.uint16))
        np.add.at(self.weight_sum.numpy(), index.numpy(), weights.numpy())
        finite = found.isfinite()
        index, found, step = index[finite], found[finite], step[finite]
        remembered = self.scores[index]
        known = ~remembered.isnan()
        pairs = torch.stack([remembered[known], found[known]], 1)[-len(self._pairs) :]
        rows = (self._paired + torch.arange(len(pairs))) % len(self._pairs)
        self._pairs[rows] = pairs
        self._paired += len(pairs)
        self.scores.numpy()[index.numpy()] = found.numpy()
        self.seen.numpy()[index.numpy()] = step.numpy()

    def refit(self) -> None:
        """Calibrate anew, from the latest pairs and the table as it is."""
        pairs = self._pairs[: self._paired]
        found = calibrate(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
        if found is not None:
            self.calibration = found
        if self.calibration is not None:
            self._count()

    def _count(self) -> None:
        calibration = self.calibration
        assert calibration is not None
        self._counts = calibration.population(self.scores)
        mean = float((self._counts * calibration.levels).sum()) / self.examples
        even = torch.ones_like(calibration.levels)
        proposal = calibration.levels / mean if mean > 0 else even
        self._relative = (1 - self.uniform_share) * proposal + self.uniform_share * even

    # ---- Measure ----

    def proposed_weights(self, index: Tensor) -> Tensor:
        """Give the weights that examples would have if they were drawn now: 1 while nothing is known.

        Over uniformly drawn examples, ``mean(Ĝ²) / mean(w Ĝ²)`` with these is the gain to expect.
        """
        if self.calibration is None:
            return torch.ones(len(index))
        return (1 / self._relative[self.calibration.bins(self.scores[index])]).float()

    def promised_gain(self, fraction: float) -> float:
        """Give the gain that the calibration promises a pass that visits this share of the examples, in (0, 1].

        The longer the pass, the more examples are certain to be in it, and no example is in it twice: a pass over
        everything is uniform sampling, with a gain of 1.
        """
        assert self.calibration is not None
        moments = self._counts * self.calibration.levels.square()
        if not float(moments.sum()) > 0:
            return 1.0
        size = max(round(fraction * self.examples), 1)
        weights = size / self.examples / inclusion_probabilities(self._relative, size, self._counts)
        return float(moments.sum() / (moments * weights).sum())

    def passes_for(self, fraction: float) -> int:
        """Give into how many passes the visits of ``fraction * N`` examples are split.

        The fewest that keep nearly all of the gain: a hard example then comes several times while an easy one comes
        once, or not at all.
        """
        best = self.promised_gain(fraction / PASSES[-1])
        return next(n for n in PASSES if self.promised_gain(fraction / n) >= KEPT_GAIN * best or n == PASSES[-1])

    # ---- Draw ----

    def begin_pass(self, batch_size: float, length: int, ranks: int, uniform: bool = False) -> None:
        """Draw the next pass.

        Args:
            batch_size: Examples of a micro-batch on each rank, on average; at least 1.
            length: Micro-batches on each rank.
            ranks: Number of ranks.
            uniform: Visit all examples alike, with weights of 1.

        Raises:
            ValueError: Nothing is known to draw by, or the pass is longer than the dataset.
        """
        size = math.floor(length * batch_size) * ranks
        if self.calibration is None or size > self.examples:
            raise ValueError(f"A pass of {size} examples cannot be drawn from {self.examples}.")
        relative = torch.ones_like(self._relative) if uniform else self._relative
        inclusion = inclusion_probabilities(relative, size, self._counts)
        generator = torch.Generator().manual_seed(key_to_seed(self.seed, self.passes, 4))
        order = torch.randperm(self.examples, generator=generator, dtype=torch.int32)
        # Off the ends, where rounding could add or lose a tooth.
        offset = 1e-6 + (1 - 2e-6) * float(torch.rand((), generator=generator, dtype=torch.float64))
        rotation = int(torch.randint(size, (), generator=generator))
        calibration, scores = self.calibration, self.scores
        index = draw_pass(lambda i: calibration.bins(scores[i]), inclusion, order, offset, rotation)
        assert len(index) == size, (len(index), size)
        weights = torch.cat(
            [(size / self.examples / inclusion[calibration.bins(scores[i])]).float() for i in index.split(CHUNK)]
        )
        self.current = Pass(index, weights, batch_size, length, self.passes, uniform)
        self.passes += 1
        self.skipped_share = 1 - size / self.examples

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """Give all but the tensors, as JSON can hold it."""
        current = self.current
        return {
            "averages": asdict(self.averages),
            "passes": self.passes,
            "skipped_share": self.skipped_share,
            "pass": None
            if current is None
            else {name: getattr(current, name) for name in ("batch_size", "length", "number", "uniform", "position")},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors that a resumed run needs."""
        found = {name: getattr(self, name) for name in TABLE}
        # The count goes with the pairs: the rest of the state may be that of the step before.
        found |= {"pairs": self._pairs, "paired": torch.tensor(self._paired)}
        if self.calibration is not None:
            found |= {"edges": self.calibration.edges, "levels": self.calibration.levels}
            found |= {"relative": self._relative, "counts": self._counts}
        if self.current is not None:
            found |= {"index": self.current.index, "weights": self.current.weights}
            if self.current.inverse is not None:
                found["inverse"] = self.current.inverse
        return found

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` and :meth:`tensors` gave."""
        self.averages = Averages(**state["averages"])
        self.passes, self.skipped_share = state["passes"], state["skipped_share"]
        for name in TABLE:
            setattr(self, name, tensors[name])
        self._pairs, self._paired = tensors["pairs"], int(tensors["paired"])
        if "edges" in tensors:
            self.calibration = Calibration(tensors["edges"], tensors["levels"])
            self._relative, self._counts = tensors["relative"], tensors["counts"]
        if state["pass"] is not None:
            self.current = Pass(tensors["index"], tensors["weights"], **state["pass"], inverse=tensors.get("inverse"))
