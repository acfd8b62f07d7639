r"""Two phases: pools are drawn by remembered scores, scored freshly, and kept in proportion to what both say.

An example of the pool has the weight :math:`w` of its first draw (:mod:`.proposal`); of ``B`` of them the share ``f``
is kept in proportion to :math:`w \hat G`. Weights multiply, so the gradient stays unbiased, however old the memory is.
The noise of a uniform step of ``b`` is that of a pool of :math:`b\,\Phi(f)`, with

.. math:: \Phi(f) = \frac{E_w[(w \hat G)^2 / \pi]}{E_w[w \hat G^2]}

over such pools: at ``f = 1`` that is 1 over the gain of the memory, so pools may be smaller than a batch, and scoring
them costs less by what memory is worth. It is measured on every step, of which kind it ever is.

Reference:
    Neyman, Contribution to the theory of sampling human populations, 1938; Särndal, Swensson and Wretman, Model
    assisted survey sampling, 1992, chapter 9 (two-phase, or double, sampling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from hf_importance.checkpoint.schema import listed, number
from hf_importance.samplers.auto import Auto
from hf_importance.samplers.history import FEWEST_EXAMPLES, UNIFORM_VISITS
from hf_importance.samplers.sampler import Facts, Scored, Visits
from hf_importance.theory.costs import LARGEST_RATIO, OFF_ABOVE, ON_BELOW, Plan, best_share, price, relative_variance
from hf_importance.theory.variance import SHARES, WithoutReplacement, inverse_moments


class TwoPhaseFactor(WithoutReplacement):
    """Φ of pools that memory has drawn; its last moment is not that of uniform examples, which it is held against."""

    uniform = 0.0

    def __call__(self, share: np.ndarray | float) -> np.ndarray:
        """Give Φ, which may be below 1; at first ``1 / share``."""
        scale = self.moments[-1] / self.uniform if self.uniform > 0 else 1.0
        return super().__call__(share) * scale


@dataclass
class TwoPhase(Auto):
    """As :class:`Auto`, with a fourth source: pools drawn by memory, where these are cheapest.

    Steps of that source have the noise of a uniform step (``"constant_variance"``), whatever the others' budget.
    """

    @dataclass
    class State(Auto.State):
        """Those of the two, and what pools drawn by memory are worth."""

        pooled: bool = False  # whether visits run that are scored
        uniform: Annotated[float, number(0, 1e300)] = 0.0
        moments: Annotated[list[float], listed(number(0, 1e300), len(SHARES))] = field(
            default_factory=lambda: [0.0] * len(SHARES)
        )

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins."""
        super().begin(run)
        self._factor = TwoPhaseFactor(self.momentum)

    def plan(self) -> Plan:
        """Say how many examples a pool has on average, drawn by memory, and how many are kept of it."""
        run, clock = self.run, self.run.clock
        overhead = (clock.overhead or 0.0) / run.gathered
        share, _ = best_share(self._factor, clock.kappa / (1 - overhead))
        pool = self.fresh.margin * run.batch_size * float(self._factor(share))
        fewest = max(run.fewest, self.fresh.fewest)
        pool = min(max(math.ceil(pool), fewest, 2), LARGEST_RATIO * run.batch_size, run.examples or math.inf)
        kept = min(max(math.ceil(share * pool - 1e-9), fewest, 1), run.batch_size, int(pool))
        cost = overhead + (clock.kappa * pool + (1 - overhead) * kept) / run.batch_size
        return Plan(int(pool), kept, cost)

    def price(self) -> float:
        """Give what the noise of a uniform step costs by such pools, relative to it; infinite while unknown."""
        known = self.run.clock.measured and self.state.uniform > 0 and self.remembered.state.count >= FEWEST_EXAMPLES
        return price(self.plan(), self.run.batch_size, self._factor, "constant_variance") if known else math.inf

    # ---- Decide ----

    def visits(self) -> Visits | None:
        """Draw pools by the table where they are cheapest, else what :class:`Auto` names."""
        run, remembered, fresh = self.run, self.remembered, self.fresh
        remembered.calibrate()
        within = run.visiting() and run.place() > 0
        others = min(remembered.price, 1.0, fresh.price() if run.clock.measured and not within else 1.0)
        was, self.state.pooled = (
            self.state.pooled,
            self.price() < (OFF_ABOVE if self.state.pooled else ON_BELOW) * others,
        )
        if not (self.state.pooled and (was or not (fresh.held or run.ending))):
            self.state.pooled = False
            return super().visits()
        if not was:
            fresh.switch(on=False)
        remembered.state.drawn = False
        planned = self.plan()
        left = max(run.updates - run.place(), 1)
        updates = min(max(run.updates // UNIFORM_VISITS, 1), left)
        visits = remembered.draw(planned.pool / run.batch_size, updates)
        assert visits.batch_size is not None
        return replace(visits, kept=max(min(planned.kept, math.floor(visits.batch_size)), 1))

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Keep rows in proportion to their scores, each counted as often as uniform draws would have given it."""
        return self.fresh.keep(pool)

    # ---- Learn ----

    def measure(self, seen: Scored) -> Sequence[float]:
        """Give what all three ask for: the last are the moments of pools drawn by memory, and Σ w Ĝ²."""
        return [*super().measure(seen), *self._moments(seen)]

    def _moments(self, seen: Scored) -> list[float]:
        if self.run.table is None or self.remembered.calibration is None:
            return [0.0] * (len(SHARES) + 1)
        assert seen.index is not None
        scores = self.fresh.in_training(seen.scores)
        weights = seen.weights
        if not (seen.kind == "pool" and self.state.pooled):  # else they were drawn so
            weights = self.remembered.weights(seen.index).double()
        sizes = list(seen.parts)
        if seen.kind != "pool":  # micro-batches may be too small to say what a pool would
            sizes = [len(scores)]
        parts = (weights.split(sizes), scores.split(sizes), seen.weights.split(sizes))
        found = (inverse_moments(w * s, stands / w) for w, s, stands in zip(*parts, strict=True))
        moments = sum(found, np.zeros(len(SHARES))).tolist()
        return [*moments, float((seen.weights * scores.square()).sum())]

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Let all three learn."""
        own = len(sums) - len(SHARES) - 1
        super().learn(tau, sums[:own])
        *moments, uniform = sums[own:]
        if uniform > 0:
            self._factor.average(moments)
            self._factor.uniform = self.momentum * self._factor.uniform + (1 - self.momentum) * uniform
            self.state.moments, self.state.uniform = self._factor.state(), self._factor.uniform

    # ---- Say, save ----

    @property
    def active(self) -> bool:
        """Whether one of the three is on."""
        return self.state.pooled or super().active

    @property
    def source(self) -> str:
        """Which of the three."""
        return "two_phase" if self.state.pooled else super().source

    @property
    def gain(self) -> float:
        """That of what is on."""
        if not self.state.pooled:
            return super().gain
        planned, size = self.plan(), self.run.batch_size
        return 1 / relative_variance(planned.pool, planned.kept, size, self._factor)

    def log_entries(self) -> dict[str, float]:
        """Give those of all three."""
        price = self.price()
        return {**super().log_entries(), **({"price_two_phase": price} if math.isfinite(price) else {})}

    def load_state_dict(self, state: Any) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.state.pooled, self.state.uniform = state["pooled"], state["uniform"]
        self.state.moments = state["moments"]
        self._factor.load(state["moments"])
        self._factor.uniform = state["uniform"]
