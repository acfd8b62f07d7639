"""Steps by fresh scores: pools are put together, scored in a forward pass without gradients, and a part is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import batch_size_of, without_index
from hf_importance.batches.pool import PooledBatches, keep_own, not_rows, stand_for
from hf_importance.batches.random import isolated_rng, key_to_seed
from hf_importance.batches.visits import Order, visit_batches
from hf_importance.objective.loss import Objective
from hf_importance.objective.scorer import Scorer
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report, Totals
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed
from hf_importance.run.step import Step
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored

# Share of the mean that every score of the user's own is raised by.
FLOOR = 0.01
NO_ITEMS = (
    "step {step}: every label of a batch is ignored (-100), so its loss is 0 / 0. Remove such examples from "
    "train_dataset, or see whether the data_collator should have made labels for them"
)


def figures(sampler: Sampler, seen: Scored) -> list[float]:
    """Give Σ w, Σ w Ĝ, Σ w Ĝ² and what the sampler measures; w is 1 where examples were drawn uniformly."""
    w, scores = seen.weights, seen.scores
    return [float(w.sum()), float((w * scores).sum()), float((w * scores.square()).sum()), *sampler.measure(seen)]


def figures_of(sampler: Sampler, table: Table | None) -> int:
    """Give how many figures there are of a step in all: those, and its items."""
    one = torch.ones(1, dtype=torch.float64)
    seen = Scored(one, None if table is None else torch.zeros(1, dtype=torch.int64), 1, 1, one, (1,))
    return len(figures(sampler, seen)) + 3


@dataclass
class Pools:
    """Scores examples that no training pass has seen yet.

    Attributes:
        sampler: Says how many, and what is kept.
        scorer: Scores them.
        objective: Counts the items of their loss.
        feed: Reads them.
        ranks: The processes.
        clock: Times it.
        facts: What the sampler knows.
        report: Counts it.
        prepare: Moves a batch to the device, as the Trainer does.
        prepares: Whether the user's code does more in it, so that what is trained on must not pass it twice.
        waits_in_passes: Whether the model is sharded over ranks, which wait for each other in each forward pass.
    """

    sampler: Sampler
    scorer: Scorer
    objective: Objective
    feed: Feed
    ranks: Ranks
    clock: Clock
    facts: Facts
    report: Report
    prepare: Callable[[Any], Any]
    prepares: bool
    waits_in_passes: bool

    def score_and_keep(self, step: Step, planned: Pool, batches: list, iterator: Iterator) -> tuple[list, Tensor]:
        """Replace each micro-batch by examples kept of itself and the reserve.

        Returns:
            The micro-batches, and the items that their loss is divided by; where the step has a problem, on this rank
            or another, nobody trains on them.
        """
        share = planned.kept / self.facts.batch_size
        pools: list[PooledBatches] = []
        raw: list[PooledBatches] = []
        indices: list[Tensor] = []
        with self.report.scoring():
            for batch in batches:
                rest = self.feed.rest_of(planned, iterator)
                step.problem = step.problem or not_rows(
                    [batch, *rest], [self.objective.rows_in(part) for part in [batch, *rest]]
                )
                if step.problem is not None:
                    break
                parts = [without_index(part) for part in [batch, *self.feed.by_length(rest)]]
                pools.append(PooledBatches([self.prepare(part) for part, _ in parts], self.feed.padding))
                raw.append(
                    PooledBatches([part for part, _ in parts], self.feed.padding) if self.prepares else pools[-1]
                )
                indices += [index for _, index in parts if index is not None]
            step.place = self.feed.where()
            if self._in_the_way(step):
                return batches, torch.tensor(0)
            with self.clock.scoring(lambda: sum(map(len, pools)), share):
                return self._keep(step, planned, pools, raw, indices, share)

    def _in_the_way(self, step: Step) -> bool:
        """Whether a rank found, before it scores, that it cannot; where ranks score apart they hear of it later."""
        bad = step.problem is not None
        if self.waits_in_passes:
            bad = any(self.ranks.gather_number(int(bad)))
        elif bad and self.ranks.size > 1:
            self.ranks.sum([0.0] * (2 + figures_of(self.sampler, self.facts.table)) + [1.0])
        step.blocked = bad
        return bad

    def _keep(
        self,
        step: Step,
        planned: Pool,
        pools: list[PooledBatches],
        raw: list[PooledBatches],
        indices: list[Tensor],
        share: float,
    ) -> tuple[list, Tensor]:
        # Where resuming, the Trainer loads the random state behind this: scoring must not move it.
        with isolated_rng(key_to_seed(self.facts.seed, self.ranks.rank, self.facts.step(), 7)):
            scores, items = self._score(planned, pools)
        index = torch.cat([part.cpu() for part in indices]) if indices else None
        sizes = tuple(len(pool) for pool in pools)
        seen = step.pool = Scored(scores, index, pools[0].sizes[0], 0, torch.ones_like(scores), sizes)
        # What a uniform step would have counted in expectation, and what the own batches count.
        shares = sum(float(n.sum()) * pool.sizes[0] / len(pool) for pool, n in zip(pools, items, strict=True))
        counts = [shares, sum(float(n[0]) for n in items)]
        # The one collective of an importance step: what will be learned from it, and its items.
        found = [*figures(self.sampler, seen), 0.0, float(torch.cat(items).sum()), float(len(scores))]
        bad = self.ranks.averaged == 1 < self.ranks.size and counts[0] == 0
        expected, own, *step.sums, blocked = self.ranks.sum([*counts, *found, float(bad)])
        step.problem = NO_ITEMS.format(step=self.facts.step() + 1) if bad else None
        step.blocked = blocked > 0
        if step.blocked:
            return [], torch.tensor(0)
        finite = math.isfinite(step.sums[1]) and math.isfinite(step.sums[2])
        if not finite:
            self.clock.whole_batch()  # all of the own batch is trained on
        drawn, trained = [], []
        for (pool, given_back), (rows, weights) in zip(
            zip(pools, raw, strict=True), self._kept(seen, pools, share, finite), strict=True
        ):
            if finite:
                batch, given = stand_for(given_back, rows, weights, share)
            else:
                batch, given = keep_own(given_back, share)
            drawn.append(batch)
            trained.append(torch.zeros(len(pool)).index_add_(0, rows, weights.float()))
            self.report.weights(given)
            step.counts.examples_trained += len(rows)
            step.counts.examples_distinct += len(rows.unique())
            step.counts.examples_saved += pool.sizes[0] - len(rows)
            step.counts.examples_scored += len(pool)
        step.trained = torch.cat(trained).double()
        step_items = share * ([expected, own] if self.ranks.averaged > 1 else counts)[0 if finite else 1]
        if step_items == 0 and self.ranks.averaged == self.ranks.size:
            step.problem, step.blocked = NO_ITEMS.format(step=self.facts.step() + 1), True
        step_items = step_items or 1.0  # else all of a rank's own labels are ignored, and its loss is 0
        self.objective.step_items = step_items
        return drawn, torch.tensor(step_items, device=self.clock.device)

    def _kept(
        self, seen: Scored, pools: list[PooledBatches], share: float, finite: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Give of each pool the rows that are kept, and their weights; its own batch where scores are not finite."""
        if not finite:
            return [(torch.arange(pool.sizes[0]), torch.ones(pool.sizes[0])) for pool in pools]
        ends = list(accumulate((len(pool) for pool in pools), initial=0))
        parts = zip(pools, starmap(slice, pairwise(ends)), strict=True)
        found = [self._rows(seen, part, pool.sizes[0], share, micro) for micro, (pool, part) in enumerate(parts)]
        weights = self.sampler.weigh(torch.cat([weights for _, weights in found]))
        sizes = [len(rows) for rows, _ in found]
        return list(zip((rows for rows, _ in found), weights.split(sizes), strict=True))

    def _rows(self, seen: Scored, part: slice, own: int, share: float, micro: int) -> tuple[Tensor, Tensor]:
        """Let the sampler keep rows of one pool."""
        scores = seen.scores[part]
        if callable(self.scorer.score):  # a user's: where it is zero the gradient may be none the less
            scores = scores + FLOOR * scores.mean()
        pool = Scored(
            scores,
            None if seen.index is None else seen.index[part],
            own,
            max(round(share * own), 1),
            seen.weights[part],
            (len(scores),),
            generator=self.facts.generator(self.ranks.rank, self.facts.step(), micro, 2),
        )
        return self.sampler.keep(pool)

    def _score(self, planned: Pool, pools: list[PooledBatches]) -> tuple[Tensor, list[Tensor]]:
        """Give the scores of all pools together, and the item count of each batch of each; on the CPU, float64."""
        scale, scorer, batch_size = self.objective.scale, self.scorer, self.facts.batch_size
        assert scale is not None
        # A stream may end sooner on one rank than on another, and a sharded model waits in each pass for all.
        waits = self.waits_in_passes and self.feed.streaming
        passes = scorer.passes(planned.size, pools[0], batch_size, planned.varies) if waits else 0
        scores = [scorer(p, scorer.largest_pass(p.in_lengths, batch_size, planned.varies), passes) for p in pools]
        items = [scale.items(batch) for pool in pools for batch in pool.batches]
        # The one wait for the device of an importance step: scores and counts come to the host together.
        on_host = torch.cat([*scores, torch.stack(items)]).cpu().double()
        found, counts = on_host.split([len(on_host) - len(items), len(items)])
        scorer.check(found)
        return found, list(counts.split([len(pool.sizes) for pool in pools]))

    def probe(self, batch: Any) -> int:
        """Score a batch for its time alone; a model that draws random numbers when it scores leaves no trace.

        Returns:
            The number of its examples.
        """
        inputs = self.prepare(without_index(batch)[0])
        device = self.clock.device
        others = [] if device.type == "cpu" else [device.index or 0]
        with isolated_rng(0), torch.random.fork_rng(others, device_type=device.type, enabled=bool(others)):
            self.scorer(PooledBatches([inputs], self.feed.padding), self.scorer.batch_size)
        return batch_size_of(inputs)

    def score_all(self, table: Table) -> None:
        """Score every example anew into the table, each rank its share; see ``Facts.score_all``.

        Where they do not divide by the number of ranks a few are scored twice, so that all take as many passes.
        """
        examples, ranks, rank = len(table.scores), self.ranks.size, self.ranks.rank
        size, share = self.scorer.batch_size or self.facts.batch_size, -(-examples // ranks)
        everything = (torch.arange(share * ranks) % examples).int()
        order = Order(everything, torch.ones(len(everything)), float(size), -(-share // size), 0)
        # Keyed apart from the draws, so that random augmentation is not the next visit's.
        seed = key_to_seed(self.facts.seed, self.facts.step(), 7)
        rows = []
        with self.report.scoring():
            for batch in visit_batches(self.feed.loader, order, 0, seed, rank, ranks):
                inputs, index = without_index(self.prepare(batch))
                assert index is not None
                found = self.scorer(PooledBatches([inputs], self.feed.padding), self.scorer.batch_size)
                rows.append(torch.stack([index.double().cpu(), found.double().cpu()], 1))
            index, found = self.ranks.gather(torch.cat(rows)).T.contiguous()
        self.report.add(Totals(examples_scored=share))
        finite = found.isfinite()
        table.replace(index[finite].long(), found[finite].float(), self.facts.step())
