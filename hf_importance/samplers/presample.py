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
from hf_importance.checkpoint.schema import COUNT, listed, number, optional
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored
from hf_importance.theory.calibration import BINS, InTraining, pair_sums
from hf_importance.theory.costs import OFF_ABOVE, ON_BELOW, Budget, Plan, plan, price, relative_variance
from hf_importance.theory.sampling import Resampling, bias_weights, exponent_of, resample
from hf_importance.theory.tau import derived_threshold
from hf_importance.theory.variance import SHARES, VarianceFactor, WithoutReplacement, WithReplacement, inverse_moments
from hf_importance.values import check_choice, check_range

logger = logging.getLogger(__name__)

# The fewest scores that say something about how few of them matter.
FEWEST_SCORES = 16


@dataclass
class Presample(Sampler):
    """Katharopoulos and Fleuret, 2018, https://arxiv.org/abs/1803.00942, with the pool that costs least.

    Raises:
        ValueError: A value is out of range or unknown.

    Attributes:
        ratio: Pool over batch, ``B / b``, above 1; None: what is cheapest by what is measured.
        threshold: τ above which it is on, at any step, above 1; None: the price of a uniform step's noise decides.
        budget: What the gain is spent on, see :mod:`hf_importance.theory.costs`; None: ``"constant_variance"`` with
            the cheapest pool, else ``"variance"``.
        score: As for :class:`Sampler`; also ``"gradient_norm"``, the true norm, one backward pass an example.
        margin: ``"constant_variance"`` keeps this many times the examples that the estimate asks for; at least 1.
        momentum: Of the averages of τ and of the variance, in ``[0, 1)``.
        resampling: ``"systematic"`` (without replacement) or ``"multinomial"`` (with, as the paper has it).
        bias: Power of the importance weights, in ``[0, 1]``; 1 leaves the gradient unbiased. The authors' ``k``.
        bias_until: Share of the run, from its start, in which ``bias`` acts, in ``[0, 1]``; what follows descends the
            mean loss, and so unlearns wrong labels that the bias has favoured.
        normalise: Whether the weights of a step have the mean 1 exactly, not on average: a bias of order 1/n, on each
            rank by itself.
        calibrate: Whether to draw by, and promise, what a pool's scores have been found to say of those in training,
            where dropout is on (:class:`.InTraining`); not with ``"multinomial"``, which is the paper's.
        kappa: Cost of scoring an example over that of training one, where it is known; None: measured.
        fewest: A micro-batch that is trained on holds at least so many examples, or all of a batch: what keeps the
            device busy.
        on_below: Price below which it goes on, positive; not within a twentieth of an epoch (of a stream: 20 steps)
            of the last switch, nor of the end of the run.
        off_above: Price above which it goes off, at least ``on_below``; as long after the last switch.
    """

    ratio: float | None = None
    threshold: float | None = None
    budget: Budget | None = None
    score: str | Callable[[Any, Tensor], Tensor] = "upper_bound"
    margin: float = 1.1
    momentum: float = 0.9
    resampling: Resampling = "systematic"
    bias: float = 1.0
    bias_until: float = 1.0
    normalise: bool = False
    calibrate: bool = True
    kappa: float | None = None
    fewest: int = 1
    on_below: float = ON_BELOW
    off_above: float = OFF_ABOVE

    @dataclass
    class State:
        """What it has learnt."""

        on: bool = False
        switched: Annotated[int | None, optional(COUNT)] = None  # optimizer steps done when a price last switched it
        moments: Annotated[list[float], listed(number(0, 1e300), len(SHARES))] = field(
            default_factory=lambda: [0.0] * len(SHARES)
        )
        pairs: Annotated[list[float], listed(number(0, 1e300), 3 * BINS)] = field(
            default_factory=lambda: [0.0] * (3 * BINS)
        )

    def __post_init__(self) -> None:
        """Check every value, and settle on a budget."""
        for name in ("ratio", "threshold"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, math.inf, "It must exceed 1.", open_low=True)
        check_range("margin", self.margin, 1, math.inf, "1.1 is the default.")
        check_range("momentum", self.momentum, 0, 1, "It is the share of the old average; 0.9.", open_high=True)
        check_range("bias", self.bias, 0, 1, "At 1, the default, the gradient is unbiased.")
        check_range("bias_until", self.bias_until, 0, 1, "At 1, the default, the bias lasts to the end.")
        if self.kappa is not None:
            check_range("kappa", self.kappa, 0, 1, "It is what scoring costs over training.", open_low=True)
        check_range("fewest", self.fewest, 1, math.inf, "1 is the default.")
        check_range("on_below", self.on_below, 0, math.inf, f"{ON_BELOW} is the default.", open_low=True)
        check_range("off_above", self.off_above, self.on_below, math.inf, "Below on_below it would go off at once.")
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
        self._factor, self.in_training = WithoutReplacement(self.momentum), InTraining()
        self._warned = False
        if self.kappa is not None:
            run.clock.give(self.kappa)

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
            smallest=max(run.fewest, self.fewest),
            gathered=run.gathered,
        )

    def price(self) -> float:
        """Give what the noise of a uniform step costs, relative to it."""
        assert self.budget is not None
        return price(self.plan(), self.run.batch_size, self.variance_factor, self.budget)

    def pays(self) -> bool:
        """Say whether, between this and uniform steps, the next ones should be this by their price."""
        return self.run.clock.measured and self.price() < (self.off_above if self.state.on else self.on_below)

    @property
    def held(self) -> bool:
        """Whether the last switch by a price is too recent for another."""
        return self.state.switched is not None and self.run.step() - self.state.switched < self.run.stay

    def switch(self, on: bool) -> None:
        """Go on or off, by a price."""
        self.state.on, self.state.switched = on, self.run.step()

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
                "'constant_time' cannot be kept: %g of %d examples are trained on. Lower presample_ratio, or make it "
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
        return resample(self.in_training(pool.scores) * pool.weights, pool.kept, self.resampling, pool.generator)

    def weigh(self, weights: Tensor) -> Tensor:
        """Bias the weights of a step as it is asked for."""
        exponent = exponent_of(self.run.step(), self.run.steps(), self.bias, self.bias_until)
        return bias_weights(weights, exponent, self.normalise)

    # ---- Learn ----

    def measure(self, seen: Scored) -> Sequence[float]:
        """Give what the variance of later draws is known by; see :mod:`hf_importance.theory.variance`."""
        if not self._measures_variance:
            return ()
        if seen.kind == "visits":
            # Few of a skewed draw hold too little of what a pool would.
            few = len(seen.scores) < FEWEST_SCORES
            return self._moments([] if few else [seen.scores], [] if few else [seen.weights])
        if seen.kind == "pool":
            parts = list(seen.parts)
            return self._moments(seen.scores.split(parts), seen.weights.split(parts))
        size = max(self.run.batch_size, FEWEST_SCORES)
        return self._moments(seen.scores.split(size), seen.weights.split(size))

    def _moments(self, pools: Iterable[Tensor], weights: Iterable[Tensor]) -> list[float]:
        found = (inverse_moments(self.in_training(s), w) for s, w in zip(pools, weights, strict=True))
        return sum(found, np.zeros(len(SHARES))).tolist()

    def compare(self, scored: Tensor, found: Tensor) -> Sequence[float]:
        """Give the pairs of scores in sums, where it calibrates; "gradient_norm" is not found in training."""
        calibrates = self.calibrate and self.resampling == "systematic" and self.score != "gradient_norm"
        return pair_sums(scored, found) if calibrates else ()

    def learn_compared(self, sums: Sequence[float]) -> None:
        """Average in the pairs."""
        if sums:
            self.in_training.average(sums)
            self.state.pairs = self.in_training.sums

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Average in the variance, and go on or off; not while visits run, which end by themselves."""
        if sums:
            self._factor.average(sums)
            self.state.moments = self._factor.state()
        if self.run.visiting():
            return
        if self.threshold is not None:
            self.state.on = self.run.tau() > self.threshold
        elif not self.held and self.pays() != self.state.on and (self.state.on or not self.run.ending):
            self.switch(not self.state.on)

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

    @property
    def cost(self) -> float | None:
        """Its price, once κ is measured, where it goes by that."""
        return self.price() if self.threshold is None and self.run.clock.measured else None

    def status(self) -> str:
        """Say what τ is compared with."""
        if self.threshold is None:
            return "measuring what scoring costs"
        return f"τ {self.run.tau():.2f} {'>' if self.state.on else '<'} {self.threshold:.2f}"

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
        self.in_training.sums = self.state.pairs
