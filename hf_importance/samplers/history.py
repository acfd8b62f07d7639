r"""Scores remembered at no cost: every training pass gives those of its examples, and the next visit is drawn by them.

Importance weights come from the probabilities actually used, so the gradient stays unbiased however old the scores
are; age costs only efficiency:

.. math:: \text{gain} = \frac{E[w \hat G^2]}{E[w^2 \hat G^2]}

over the examples visited, with weights ``w`` of mean 1: the second moment of a uniformly drawn gradient over that of
the one drawn here. ``n = b / gain`` examples have the noise of ``b`` uniform ones.

How large a step must be has to be known before it is drawn, and the gain grows as training goes: its average over
past draws is that of a table half a window ago, too small by 7 to 12 % on Fashion-MNIST, which is as much noise too
little. So each draw promises a gain of its own, from the whole table as it is (:meth:`.Proposal.promised_gain`), and
what is averaged is how promises were kept:

.. math:: \text{gain of the next draw} = \text{its promise} \cdot
    \frac{\langle w \hat G^2 \rangle}{\langle \text{promise} \cdot w^2 \hat G^2 \rangle}

The second factor is 1 of a calibration that is right, and averaged as if it had been 1 for as many examples more as
the average goes back to: from half an epoch it is itself known to some percent only. It is what a memory that suddenly
says nothing is seen by. Left out are the mean gradient, which has no noise (with the share m
of the second moment, a step has :math:`(1 - m\,\text{gain}) / (1 - m)` of the noise promised), and that a score is
only a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import COUNT, listed, number
from hf_importance.samplers.proposal import Proposal
from hf_importance.samplers.sampler import Facts, Sampler, Scored, Visits
from hf_importance.theory.calibration import Calibration
from hf_importance.theory.costs import OFF_ABOVE, ON_BELOW
from hf_importance.theory.sampling import bias_weights, exponent_of
from hf_importance.values import check_choice, check_range

SMALLEST_FRACTION = 1 / 16  # of the uniform batch; below, a step's own noise estimate means little
# Of an epoch's examples, those that say how promises are kept: short enough to see that memory has become worthless.
WINDOW = 1 / 2
# Examples that the gain must stand on before it is believed.
FEWEST_EXAMPLES = 200
UNIFORM_VISITS = 10  # of an epoch that nobody else reads: they end ten times, so that a new decision can be taken

_SUM = number(0, 1e300)
MemoryBudget = Literal["variance", "constant_variance"]


@dataclass
class History(Sampler):
    """Draws by remembered scores, calibrated (:mod:`.proposal`), while the measured gain is worth it.

    Raises:
        ValueError: A value is out of range or unknown.

    Attributes:
        budget: ``"variance"`` (batches as large as ever, less noise) or ``"constant_variance"`` (smaller batches).
        score: As for :class:`Sampler`.
        margin: ``"constant_variance"`` keeps this many times the examples that the gain asks for, and it is on only
            while the gain exceeds it; at least 1, which is the noise of a uniform step.
        share: ε, the share of every draw that is uniform, in ``(0, 1]``; weights stay below its inverse.
        momentum: Of the average of τ, in ``[0, 1)``.
        bias: Power of the importance weights, in ``[0, 1]``; 1 leaves the gradient unbiased. The authors' ``k``.
        bias_until: Share of the run, from its start, in which ``bias`` acts, in ``[0, 1]``; what follows descends the
            mean loss, and so unlearns wrong labels that the bias has favoured.
        normalise: Whether the weights of a step have the mean 1 exactly, not on average: a bias of order 1/n.
    """

    budget: MemoryBudget = "variance"
    score: str | Callable[[Any, Tensor], Tensor] = "upper_bound"
    margin: float = 1.0
    share: float = 0.1
    momentum: float = 0.9
    bias: float = 1.0
    bias_until: float = 1.0
    normalise: bool = False

    remembers = True

    @dataclass
    class State:
        """Moving sums over recent steps, and the calibration."""

        count: Annotated[float, _SUM] = 0.0  # examples that the two sums below stand for
        uniform_moment: Annotated[float, _SUM] = 0.0  # Σ w Ĝ²
        promised_moment: Annotated[float, _SUM] = 0.0  # Σ w² Ĝ² times the gain promised, which would be as much
        promised: Annotated[float, number(0, 1e300)] = 1.0  # gain, by the draw that runs or would run
        drawn: bool = False  # whether visits run that were drawn by scores, not uniformly
        skipped_share: Annotated[float, number(0, 1)] = 0.0  # of the examples, by the last draw
        edges: list[float] = field(default_factory=list)
        levels: Annotated[list[float], listed(_SUM)] = field(default_factory=list)
        counts: Annotated[list[int], listed(COUNT)] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check every value."""
        check_choice("budget", self.budget, get_args(MemoryBudget))
        check_range("margin", self.margin, 1, math.inf, "1 is the default.")
        check_range("share", self.share, 0, 1, "0.1 is the default.", open_low=True)
        check_range("momentum", self.momentum, 0, 1, "It is the share of the old average; 0.9.", open_high=True)
        check_range("bias", self.bias, 0, 1, "At 1, the default, the gradient is unbiased.")
        check_range("bias_until", self.bias_until, 0, 1, "At 1, the default, the bias lasts to the end.")

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins."""
        super().begin(run)
        self.proposal = Proposal(self.share)

    # ---- Decide ----

    @property
    def price(self) -> float:
        """What the noise of a uniform step costs, relative to it; infinite while unknown."""
        known = self.proposal.calibration is not None and self.state.count >= FEWEST_EXAMPLES
        return self.margin / self.gain if known else math.inf

    def visits(self) -> Visits | None:
        """Draw the next visits by the table where that pays, else uniformly."""
        return self.cheapest(otherwise=1.0)

    @property
    def calibration(self) -> Calibration | None:
        """What a remembered score says of today's; None while nothing is known."""
        return self.proposal.calibration

    def weights(self, index: Tensor) -> Tensor:
        """Give the weights that examples would have if they were drawn now."""
        return self.proposal.weights(self.run.table.scores[index])

    def calibrate(self) -> None:
        """Bring the proposal up to date with the table."""
        table, state = self.run.table, self.state
        self.proposal.refit(table.scores, table.pairs)
        calibration = self.proposal.calibration
        if calibration is not None:
            state.edges, state.levels = calibration.edges.tolist(), calibration.levels.tolist()
            state.counts = self.proposal.counts.tolist()
            state.promised = self.proposal.promised_gain(0)

    def cheapest(self, otherwise: float) -> Visits | None:
        """Draw by the table where that is cheapest.

        Args:
            otherwise: What the noise of a uniform step costs in the steps that come else: 1 if they are uniform; 0:
                now is not the time to begin.
        """
        run, state = self.run, self.state
        # Nobody has read the batches of this epoch, so the steps until its end are visits either way.
        within = run.visiting() and run.place() > 0
        was_drawn = state.drawn
        self.calibrate()
        limit = OFF_ABOVE if was_drawn else ON_BELOW
        state.drawn = self.price < limit * (1.0 if within else otherwise) and (was_drawn or not run.ending)
        if state.drawn:
            return self._by_scores()
        return self._uniformly() if within else None

    def _by_scores(self) -> Visits:
        """Draw with batches as large as the budget asks for."""
        run, proposal, fraction = self.run, self.proposal, self._fraction()
        left = max(run.updates - run.place(), 1)
        # A draw of all examples would be uniform.
        splits = max(proposal.splits_for(fraction), 2 if fraction == 1 else 1)
        self.state.promised = proposal.promised_gain(fraction / splits)
        visits = self.draw(self._fraction(), math.ceil(left / max(round(left / run.updates * splits), 1)))
        self.state.promised = proposal.promised_gain(1 - self.state.skipped_share)
        return visits if self.bias == 1 and not self.normalise else self._biased(visits)

    def _fraction(self) -> float:
        """Give the share of a uniform batch that the budget asks for, by the gain that is promised now."""
        if self.budget == "variance":
            return 1.0
        smallest = max(SMALLEST_FRACTION, self.run.fewest / self.run.batch_size)
        return min(max(self.margin / self.gain, smallest), 1.0)

    def _uniformly(self) -> Visits:
        """Draw a part of an epoch, or what is left of it, uniformly."""
        left = max(self.run.updates - self.run.place(), 1)
        return self.draw(1.0, min(max(self.run.updates // UNIFORM_VISITS, 1), left), uniform=True)

    def draw(self, fraction: float, updates: int, uniform: bool = False) -> Visits:
        """Draw the examples of so many optimizer steps, each of ``fraction`` of a batch."""
        run = self.run
        assert run.examples is not None
        length = min(updates * run.accumulation, run.micro_batches_left)
        # Where the last batch is short, or padded to be even over ranks, there are more places than examples.
        batch_size = min(run.batch_size * fraction, run.examples / (length * run.ranks))
        size = math.floor(length * batch_size) * run.ranks
        index, weights = self.proposal.draw(run.table.scores, size, run.generator(run.draws(), 4), uniform)
        self.state.skipped_share = 1 - size / run.examples
        return Visits(index, weights, length, batch_size=batch_size, uniform=uniform)

    def _biased(self, visits: Visits) -> Visits:
        """Bias the weights, an optimizer step of all ranks at a time."""
        assert visits.batch_size is not None
        run = self.run
        firsts = [*range(0, visits.micro_batches, run.accumulation), visits.micro_batches]
        ends = [math.floor(micro * visits.batch_size) * run.ranks for micro in firsts]
        together = visits.weights.split([end - start for start, end in pairwise(ends)])
        biased = [
            bias_weights(own, exponent_of(step, run.steps(), self.bias, self.bias_until), self.normalise)
            for step, own in enumerate(together, run.step())
        ]
        return replace(visits, weights=torch.cat(biased), represents=visits.weights)

    # ---- Learn ----

    def measure(self, seen: Scored) -> Sequence[float]:
        """Give Σw, Σ w Ĝ² and Σ w² Ĝ², the last with the weights that the table would have given uniform examples."""
        squares = seen.scores.square()
        assert seen.index is not None
        if seen.kind == "visits" and self.state.drawn:
            proposed = seen.weights.square()
        else:
            proposed = self.weights(seen.index) * seen.weights
        return [float(seen.weights.sum()), float((seen.weights * squares).sum()), float((proposed * squares).sum())]

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Average in how the promise was kept, over as many examples however many steps these are."""
        state = self.state
        if self.proposal.calibration is None:
            return
        count, uniform_moment, drawn_moment = sums
        step, window = self._window
        keep = (1 - step / window) ** (count / step)
        state.count = keep * state.count + count
        state.uniform_moment = keep * state.uniform_moment + uniform_moment
        state.promised_moment = keep * state.promised_moment + state.promised * drawn_moment

    @property
    def _window(self) -> tuple[int, float]:
        """Examples of a uniform step, and those that the average goes back to."""
        step = self.run.batch_size * self.run.accumulation * self.run.ranks
        return step, max(WINDOW * self.run.updates * step, 20 * step, 2 * FEWEST_EXAMPLES)

    # ---- Say, save ----

    @property
    def active(self) -> bool:
        """Whether visits run that were drawn by scores."""
        return self.state.drawn

    @property
    def gain(self) -> float:
        """Second moment of uniform sampling over that of the draw that runs or would run; 1 while nothing is known."""
        state = self.state
        if not state.uniform_moment > 0:
            return 1.0
        broken, (_, window) = state.promised_moment / state.uniform_moment, self._window
        return state.promised * (window + state.count) / (window + broken * state.count)

    @property
    def cost(self) -> float | None:
        """Its price, once enough was remembered."""
        return self.price if math.isfinite(self.price) else None

    def status(self) -> str:
        """Say why there is no price yet."""
        return "remembering scores"

    def log_entries(self) -> dict[str, float]:
        """Give the gain, what the table holds, and what was skipped."""
        table = self.run.table.log_entries(self.run.step())
        return {"gain": self.gain, **table, "skipped_share": self.state.skipped_share}

    def load_state_dict(self, state: Any) -> None:
        """Take up what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        edges, levels, counts = self.state.edges, self.state.levels, self.state.counts
        if not (edges or levels or counts):
            return
        fitting = len(edges) + 1 == len(levels) == len(counts) and sum(counts) > 0
        if not fitting or edges != sorted(edges) or levels != sorted(levels):
            raise ValueError(
                "The calibration in the state of History is damaged: edges, levels and counts do not fit together. "
                "Resume from an older checkpoint."
            )
        bounds, means = torch.tensor(edges, dtype=torch.float32), torch.tensor(levels, dtype=torch.float64)
        self.proposal.take(Calibration(bounds, means), torch.tensor(counts))
