"""What the next step scores and keeps, and the κ that this follows from: the part of the trainer that counts costs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_importance.batches import Padding, Pool, batch_size_of, reserve_unit
from hf_importance.costs import HYSTERESIS, Plan, plan, price
from hf_importance.kappa import KappaMeter, Part
from hf_importance.switching import Switch
from hf_importance.training_args import PRESAMPLING
from hf_importance.variance import SHARES, VarianceFactor, WithoutReplacement, WithReplacement, inverse_moments
from hf_importance.visits import without_index
from hf_importance.weighted_loss import WeightedLossMixin

logger = logging.getLogger(__name__)

# Of a batch's examples, to measure by what a step costs that does not shrink with them.
FEW = 0.75
# Presampling goes off again where it costs 2 % more than uniform steps, so that noise does not make it flap.
TOLERATED_PRICE = 1.02
# Examples that a model with BatchNorm keeps at least, where the batch has as many: below, its moments are too noisy.
# For ResNet-50 see Wu and He, 2018, https://arxiv.org/abs/1803.08494, table 2; for MobileNetV2 docs/batch_norm.md.
FEWEST_FOR_BATCH_NORM = 16
# The fewest scores that say something about how few of them matter.
FEWEST_SCORES = 16


class PlanningMixin(WeightedLossMixin):
    """Measures κ on the way and plans each importance step by it."""

    _meter: KappaMeter
    _switch: Switch
    _variance: WithoutReplacement
    _train_loader: Any
    _warned_time = False
    # When the step in progress asked for its data.
    _step_mark: Any = None
    # As what the step in progress is timed once κ is known: on so few examples that its time says what does not shrink
    # with them, on whole uniform batches ("train"), or not at all.
    _timed_as: Part | None = None

    def _score_pool(self, pool: Pool, passes: int = 0) -> Tensor:
        raise NotImplementedError

    def _padding(self) -> Padding:
        raise NotImplementedError

    @property
    def _revisiting(self) -> bool:
        """Whether the steps are those of a pass."""
        raise NotImplementedError

    @property
    def _presampling(self) -> bool:
        """Whether the steps are drawn from scored pools."""
        raise NotImplementedError

    def _plan(self) -> Plan:
        """Say how many examples the next step scores and keeps; all ranks come to the same.

        It looks at κ and at the scores of earlier steps only.
        """
        settings, size = self.importance_args, self._train_batch_size
        data = self._train_loader.dataset
        streaming = isinstance(data, IterableDataset)
        found = plan(
            settings.importance_budget,
            size,
            self._variance_factor,
            self._meter.kappa,
            settings.ratio,
            settings.variance_margin,
            self._meter.overhead or 0.0,
            unit=size if streaming else reserve_unit(size),
            largest=None if streaming else len(data),
            smallest=self._fewest_kept,
        )
        if settings.importance_budget == "constant_time" and found.cost > 1 + 1e-9 and not self._warned_time:
            self._warned_time = True
            logger.warning(
                "Scoring %d examples takes as long as training on %.1f (kappa %.3f), so importance_budget="
                "'constant_time' cannot be kept: %d of %d examples are trained on. Lower presample_ratio, or make it "
                "'auto'.",
                found.pool,
                found.pool * self._meter.kappa,
                self._meter.kappa,
                found.kept,
                size,
            )
        return found

    @property
    def _fewest_kept(self) -> int:
        """Examples that are kept at least: what BatchNorm normalises by must not come from a handful of hard ones."""
        by_batch = self._batch_norm and self.importance_args.batch_norm not in ("running", "frozen")
        return FEWEST_FOR_BATCH_NORM if by_batch else 1

    @property
    def _variance_factor(self) -> VarianceFactor:
        """What keeping a share of a pool does to the variance, as far as is known."""
        with_replacement = self.importance_args.resampling == "multinomial"
        return WithReplacement(self._switch.tau) if with_replacement else self._variance

    def _step_moments(self, scores: Tensor, weights: Tensor) -> list[float]:
        """Give what :meth:`_inverse_moments` does, of the scores that training itself found.

        Args:
            scores: Of one optimizer step on this rank, shape ``(m,)``.
            weights: How many uniformly drawn examples each stands for, shape ``(m,)``.
        """
        if self._revisiting:
            # Few of a skewed draw hold too little of what a pool would.
            return self._inverse_moments([scores] if len(scores) >= FEWEST_SCORES else [], weights)
        return self._inverse_moments(scores.split(max(self._train_batch_size, FEWEST_SCORES)))

    def _presampling_price(self) -> float:
        """Give what the noise of a uniform step costs by presampling, relative to it."""
        budget = self.importance_args.importance_budget
        return price(self._plan(), self._train_batch_size, self._variance_factor, budget)

    def _presampling_pays(self) -> bool:
        """Say whether, between presampling and uniform steps, the next ones should presample."""
        if not self._meter.measured:
            return False
        among_three = self.importance_args.importance_method == "auto"
        on, off = (1 / HYSTERESIS, 1.0) if among_three else (1.0, TOLERATED_PRICE)
        return self._presampling_price() < (off if self._presampling else on)

    def _inverse_moments(self, pools: Iterable[Tensor], weights: Tensor | None = None) -> list[float]:
        """Give what the variance of later draws is known by, to be summed over ranks; empty where nobody asks."""
        if not self.importance_args.measures_variance:
            return []
        return sum((inverse_moments(scores, weights) for scores in pools), np.zeros(len(SHARES))).tolist()

    def _mark(self, later: bool = False) -> Any:
        """Give a point in time where κ, or ``later`` α, is still to be measured and steps tell of it."""
        presampling = self._sampling and self.importance_args.importance_method in PRESAMPLING
        wanted = presampling and (self.importance_args.needs_kappa or self._switch.active)
        return self._meter.mark(later) if wanted else None

    @property
    def _pool_parts(self) -> tuple[Part, Part]:
        """As what the waiting for a pool and its scoring are timed: in place of probes, or to say κ again."""
        return ("pool wait", "pool") if self._meter.measured else ("wait", "score")

    def _probe(self, batches: list, started: Any) -> None:
        """While off, time the scoring of a few micro-batches where a decision waits for κ."""
        if started is None:
            return
        self._meter.add("wait", started, sum(batch_size_of(batch) for batch in batches))
        if self._meter.lacks("score"):
            pool = Pool([self._prepare_inputs(without_index(batches[0])[0])], self._padding())
            mark = self._mark()
            self._score_pool(pool)
            self._meter.add("score", mark, len(pool))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch as ``Trainer`` does, and time it while κ or α is to be measured."""
        later = self._timed_as is not None and self._meter.measured
        mark = self._mark(later)
        examples = 0 if mark is None else batch_size_of(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if mark is not None:
            self._meter.add((self._timed_as if later else None) or "train", mark, examples)
        return loss

    def _learn_kappa(self) -> None:
        """Take κ as measured once enough was timed, the same on all ranks: one collective in a run."""
        if self._meter.few_ready:
            kappa, overhead, ranks = self._sum_over_ranks([*self._meter.read_few(self._train_batch_size), 1.0])
            self._meter.settle_few(kappa / ranks, overhead / ranks)
            logger.info(
                "In steps on few examples, scoring one takes %.3f of training on one, and %.3f of a step's time does "
                "not shrink.",
                self._meter.kappa,
                self._meter.overhead,
            )
        if not self._meter.ready:
            return
        presampling, training, ranks = self._sum_over_ranks([*self._meter.read(), 1.0])
        self._meter.settle(presampling / ranks, training / ranks)
        logger.info("Scoring an example takes %.3f of training on one.", self._meter.kappa)
