"""The paper's method: a pool scored in a forward pass of its own, and a batch kept of it, while that pays."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import numpy as np
from torch import Tensor

from hf_importance.batches.reserve import reserve_unit
from hf_importance.checkpoint.schema import listed, number
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored
from hf_importance.theory.costs import Budget, Plan, plan, price, relative_variance
from hf_importance.theory.sampling import Resampling, bias_weights, resample
from hf_importance.theory.tau import derived_threshold
from hf_importance.theory.variance import SHARES, VarianceFactor, WithoutReplacement, WithReplacement, inverse_moments
from hf_importance.values import check_choice, check_range

logger = logging.getLogger(__name__)

# The fewest scores that say something about how few of them matter.
FEWEST_SCORES = 16
# It goes off again where it costs 2 % more than uniform steps, so that noise does not make it flap.
TOLERATED_PRICE = 1.02


@dataclass
class Presample(Sampler):
    """Katharopoulos and Fleuret, 2018, https://arxiv.org/abs/1803.00942, with the pool that costs least.

    Raises:
        ValueError: A value is out of range or unknown.

    Attributes:
        ratio: Pool over batch, ``B / b``, above 1; None: what is cheapest by what is measured.
        threshold: τ above which it is on, above 1; None: while the noise of a uniform step costs less than one.
        budget: What the gain is spent on, see :mod:`hf_importance.theory.costs`; None: ``"constant_variance"`` with
            the cheapest pool, else ``"variance"``.
        score: As for :class:`Sampler`; also ``"gradient_norm"``, the true norm, one backward pass an example.
        margin: ``"constant_variance"`` keeps this many times the examples that the estimate asks for; at least 1.
        momentum: Of the averages of τ and of the variance, in ``[0, 1)``.
        resampling: ``"systematic"`` (without replacement) or ``"multinomial"`` (with, as the paper has it).
        bias: Power of the importance weights, in ``[0, 1]``; 1 leaves the gradient unbiased. The authors' ``k``.
        normalise: Whether the weights of a step have the mean 1 exactly, not on average: a bias of order 1/n, on each
            rank by itself.
        kappa: Cost of scoring an example over that of training one, where it is known; None: measured.
        on_below: Price below which it goes on.
        off_above: Price above which it goes off.
    """

    ratio: float | None = None
    threshold: float | None = None
    budget: Budget | None = None
    score: str | Callable[[Any, Tensor], Tensor] = "upper_bound"
    margin: float = 1.1
    momentum: float = 0.9
    resampling: Resampling = "systematic"
    bias: float = 1.0
    normalise: bool = False
    kappa: float | None = None
    on_below: float = 1.0
    off_above: float = TOLERATED_PRICE

    @dataclass
    class State:
        """What it has learnt."""

        on: bool = False
        moments: Annotated[list[float], listed(number(0, 1e300), len(SHARES))] = field(
            default_factory=lambda: [0.0] * len(SHARES)
        )

    def __post_init__(self) -> None:
        """Check every value, and settle on a budget."""
        for name in ("ratio", "threshold"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, math.inf, "It must exceed 1.", open_low=True)
        check_range("margin", self.margin, 1, math.inf, "1.1 is the default.")
        check_range("momentum", self.momentum, 0, 1, "It is the share of the old average; 0.9.", open_high=True)
        check_range("bias", self.bias, 0, 1, "At 1, the default, the gradient is unbiased.")
        if self.kappa is not None:
            check_range("kappa", self.kappa, 0, 1, "It is what scoring costs over training.", open_low=True)
        check_choice("resampling", self.resampling, get_args(Resampling))
        if self.budget is None:
            self.budget = "constant_variance" if self.ratio is None else "variance"
        check_choice("budget", self.budget, get_args(Budget))

    @classmethod
    def paper(cls, ratio: float = 3.0, **others: Any) -> Presample:
        """Give the paper's Algorithm 1: a fixed pool, with replacement, on above ``(B + 3b) / (3b)``."""
        return cls(ratio=ratio, threshold=derived_threshold(ratio), resampling="multinomial", **others)

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins."""
        super().begin(run)
        self._factor = WithoutReplacement(self.momentum)
        self._warned = False
        if self.kappa is not None:
            run.clock.load(self.kappa)

    # ---- Price ----

    @property
    def timed(self) -> bool:
        """Whether a decision, or the report while it is on, depends on what scoring costs."""
        return self._needs_kappa or self.state.on

    @property
    def _needs_kappa(self) -> bool:
        return self.threshold is None or self.ratio is None or self.budget == "constant_time"

    @property
    def _measures_variance(self) -> bool:
        return self.resampling == "systematic" and (self._needs_kappa or self.budget == "constant_variance")

    @property
    def variance_factor(self) -> VarianceFactor:
        """What keeping a share of a pool does to the variance, as far as is known."""
        return WithReplacement(self.run.tau()) if self.resampling == "multinomial" else self._factor

    def plan(self) -> Plan:
        """Say how many examples the next step scores and keeps, by κ and the scores of earlier steps."""
        run, clock = self.run, self.run.clock
        assert self.budget is not None
        return plan(
            self.budget,
            run.batch_size,
            self.variance_factor,
            clock.kappa,
            self.ratio,
            self.margin,
            clock.overhead or 0.0,
            unit=run.batch_size if run.examples is None else reserve_unit(run.batch_size),
            largest=run.examples,
            smallest=run.fewest,
        )

    def price(self) -> float:
        """Give what the noise of a uniform step costs, relative to it."""
        assert self.budget is not None
        return price(self.plan(), self.run.batch_size, self.variance_factor, self.budget)

    def pays(self) -> bool:
        """Say whether, between this and uniform steps, the next ones should be this."""
        return self.run.clock.measured and self.price() < (self.off_above if self.state.on else self.on_below)

    # ---- Decide ----

    def pool(self) -> Pool | None:
        """Score what the plan says, while it is on."""
        if not self.state.on:
            return None
        planned = self.plan()
        if self.budget == "constant_time" and planned.cost > 1 + 1e-9 and not self._warned:
            self._warned = True
            logger.warning(
                "Scoring %d examples takes as long as training on %.1f (kappa %.3f), so importance_budget="
                "'constant_time' cannot be kept: %d of %d examples are trained on. Lower presample_ratio, or make it "
                "'auto'.",
                planned.pool,
                planned.pool * self.run.clock.kappa,
                self.run.clock.kappa,
                planned.kept,
                self.run.batch_size,
            )
        return Pool(planned.pool, planned.kept, varies=self.ratio is None)

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Keep rows in proportion to their scores."""
        return resample(pool.scores, pool.kept, self.resampling, pool.generator)

    def weigh(self, weights: Tensor) -> Tensor:
        """Bias the weights of a step as it is asked for."""
        return bias_weights(weights, self.bias, self.normalise)

    # ---- Learn ----

    def measure(self, seen: Scored) -> Sequence[float]:
        """Give what the variance of later draws is known by; see :mod:`hf_importance.theory.variance`."""
        if not self._measures_variance:
            return ()
        if seen.kind == "visits":
            # Few of a skewed draw hold too little of what a pool would.
            return self._moments([seen.scores] if len(seen.scores) >= FEWEST_SCORES else [], seen.weights)
        if seen.kind == "pool":
            return self._moments(seen.scores.split(list(seen.parts)))
        return self._moments(seen.scores.split(max(self.run.batch_size, FEWEST_SCORES)))

    def _moments(self, pools: Iterable[Tensor], weights: Tensor | None = None) -> list[float]:
        return sum((inverse_moments(scores, weights) for scores in pools), np.zeros(len(SHARES))).tolist()

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Average in the variance, and go on or off; not while visits run, which end by themselves."""
        if sums:
            self._factor.average(sums)
            self.state.moments = self._factor.state()
        if not self.run.visiting():
            self.state.on = self.pays() if self.threshold is None else self.run.tau() > self.threshold

    # ---- Say, save ----

    @property
    def active(self) -> bool:
        """Whether it is on."""
        return self.state.on

    @property
    def gain(self) -> float:
        """How many times as large a uniform batch would be with the noise of a step of its."""
        planned, size = self.plan(), self.run.batch_size
        return 1 / relative_variance(planned.pool, planned.kept, size, self.variance_factor)

    def status(self) -> str:
        """Say what τ is compared with."""
        if self.threshold is None:
            return f"price {self.price():.2f}"
        return f"{'>' if self.state.on else '<'} {self.threshold:.2f}"

    def log_entries(self) -> dict[str, float]:
        """Give the threshold or the price, κ and α."""
        clock, entries = self.run.clock, {}
        if self.threshold is not None:
            entries["tau_threshold"] = self.threshold
        entries["kappa"] = clock.kappa
        if clock.overhead is not None:
            entries["overhead"] = clock.overhead
        if self.threshold is None:
            entries["price_presample"] = self.price()
        return entries

    def load_state_dict(self, state: Any) -> None:
        """Take up what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._factor.load(self.state.moments)
