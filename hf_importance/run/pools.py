"""Steps by fresh scores: pools are put together, scored in a forward pass without gradients, and a part is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import batch_size_of, without_index
from hf_importance.batches.lengths import lengths_of
from hf_importance.batches.pool import PooledBatches, keep_own, not_rows, stand_for
from hf_importance.batches.random import isolated_rng, key_to_seed
from hf_importance.batches.visits import Order, visit_batches
from hf_importance.objective.loss import Objective
from hf_importance.objective.scorer import Scorer
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report, Totals
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed, Handed
from hf_importance.run.step import Step
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored
from hf_importance.transfer import to_device

# Share of the mean that every score of the user's own is raised by.
FLOOR = 0.01
NO_ITEMS = (
    "step {step}: every label of a batch is ignored (-100), so its loss is 0 / 0. Remove such examples from "
    "train_dataset, or see whether the data_collator should have made labels for them"
)


def figures(sampler: Sampler, seen: Scored, compared: Sequence[float]) -> list[float]:
    """Give Σ w, Σ w Ĝ, Σ w Ĝ², what the sampler measures, and what it compared in the step before.

    w is 1 where examples were drawn uniformly.
    """
    w, scores = seen.weights, seen.scores
    sums = [float(w.sum()), float((w * scores).sum()), float((w * scores.square()).sum())]
    return [*sums, *sampler.measure(seen), *compared]


def nothing_compared(sampler: Sampler) -> list[float]:
    """Give the figures of no pairs."""
    none = torch.empty(0, dtype=torch.float64)
    return list(sampler.compare(none, none))


def figures_of(sampler: Sampler, table: Table | None) -> int:
    """Give how many figures there are of a step in all: those, and its items."""
    one = torch.ones(1, dtype=torch.float64)
    seen = Scored(one, None if table is None else torch.zeros(1, dtype=torch.int64), 1, 1, one, (1,))
    return len(figures(sampler, seen, nothing_compared(sampler))) + 3


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
                parts = [without_index(part)[0] for part in [batch, *rest]]
                step.problem = step.problem or not_rows(parts, [self.objective.rows_in(part) for part in parts])
                if step.problem is not None:
                    break
                pool = [without_index(part) for part in [batch, *self.feed.in_passes(rest)]]
                indices += [index for _, index in pool if index is not None]
                given = PooledBatches([to_device(part, self.clock.device) for part, _ in pool], self.feed.padding)
                pools.append(PooledBatches([self.prepare(part) for part in given.batches], self.feed.padding))
                raw.append(given if self.prepares else pools[-1])
            step.place = self.feed.where()
            if self._in_the_way(step):
                return batches, torch.tensor(0)
            with self.clock.scoring(lambda: sum(map(len, pools)), share):
                return self._keep(step, planned, pools, raw, indices)

    def score_visits(self, step: Step, planned: Pool, handed: Handed, items: float) -> tuple[list, Tensor]:
        """Score what visits name, and keep a part, as :meth:`score_and_keep`; ``items`` are a uniform example's."""
        with self.report.scoring():
            given = [without_index(batch) for batch in handed.batches]
            problems = (not_rows([part], [self.objective.rows_in(part)]) for part, _ in given)
            step.problem = next(filter(None, problems), None)
            step.place = self.feed.where()
            if self._in_the_way(step):
                return [], torch.tensor(0)
            raw = [PooledBatches([to_device(part, self.clock.device)], self.feed.padding) for part, _ in given]
            pools = [PooledBatches([self.prepare(part) for part in pool.batches], pool.padding) for pool in raw]
            indices = [index for _, index in given if index is not None]
            return self._keep(step, planned, pools, raw if self.prepares else pools, indices, items)

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
        items_each: float | None = None,
    ) -> tuple[list, Tensor]:
        # Where resuming, the Trainer loads the random state behind this: scoring must not move it.
        with isolated_rng(key_to_seed(self.facts.seed, self.ranks.rank, self.facts.step(), 7)):
            scores, items, lengths = self._score(step, planned, pools)
        index = torch.cat(indices) if indices else None
        sizes, share = tuple(len(pool) for pool in pools), planned.kept / self.facts.batch_size
        # Pools that visits name stand for a whole batch each, and were scored with the weights that they bring.
        visited = step.represents is not None
        stands = step.represents if step.represents is not None else torch.ones_like(scores)
        owns = [self.facts.batch_size if visited else pool.sizes[0] for pool in pools]
        seen = step.pool = Scored(scores / stands, index, owns[0], 0, stands, sizes)
        # What a uniform step would have counted in expectation, and what the own batches count.
        shares = sum(float(n.sum()) * own / len(pool) for pool, own, n in zip(pools, owns, items, strict=True))
        counts = [shares, sum(float(n[0]) for n in items)]
        counts = counts if items_each is None else [sum(owns) * items_each] * 2
        # The one collective of an importance step: what will be learned from it, and its items.
        found = [*figures(self.sampler, seen, step.compared), 0.0, float(torch.cat(items).sum()), float(len(scores))]
        bad = self.ranks.averaged == 1 < self.ranks.size and counts[0] == 0
        expected, own, *step.sums, blocked = self.ranks.sum([*counts, *found, float(bad)])
        step.problem = NO_ITEMS.format(step=self.facts.step() + 1) if bad else step.problem
        step.blocked = blocked > 0
        if step.blocked:
            return [], torch.tensor(0)
        finite = math.isfinite(step.sums[1]) and math.isfinite(step.sums[2])
        if not finite:
            self.clock.whole_batch()  # all of the own batch is trained on
        drawn, trained, scored, weighed = [], [], [], []
        kept = self._kept(seen, [len(pool) for pool in pools] if visited else owns, owns, share, finite)
        for micro, (pool, given_back, (rows, weights)) in enumerate(zip(pools, raw, kept, strict=True)):
            stands = seen.weights[sum(sizes[:micro]) : sum(sizes[: micro + 1])]
            if finite or visited:
                # A user's _prepare_inputs may have made other columns.
                width = None if self.prepares or not lengths else int(lengths[micro][rows].max())
                batch, given = stand_for(given_back, rows, weights, share, width, owns[micro])
            else:
                batch, given = keep_own(given_back, share)
            drawn.append(batch)
            trained.append(torch.zeros(len(pool)).index_add_(0, rows, weights.float()) * stands)
            in_order = rows.sort().values  # as the batch is
            given = given * stands[in_order]
            scored.append(seen.scores[sum(sizes[:micro]) :][in_order])
            weighed.append(given * (share * owns[micro] / len(rows)))
            self.report.weights(given.float())
            step.counts.examples_trained += len(rows)
            step.counts.examples_distinct += len(rows.unique())
            step.counts.examples_saved += owns[micro] - len(rows)
            step.counts.examples_scored += len(pool)
        step.trained = torch.cat(trained).double()
        if finite and step.compared:
            step.kept = torch.cat(scored), torch.cat(weighed)
        step_items = share * ([expected, own] if self.ranks.averaged > 1 else counts)[0 if finite else 1]
        if step_items == 0 and self.ranks.averaged == self.ranks.size:
            step.problem, step.blocked = NO_ITEMS.format(step=self.facts.step() + 1), True
        step_items = step_items or 1.0  # else all of a rank's own labels are ignored, and its loss is 0
        self.objective.step_items = step_items
        return drawn, torch.full((), step_items, device=self.clock.device)

    def _kept(
        self, seen: Scored, wholes: list[int], owns: list[int], share: float, finite: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Give of each pool the rows that are kept, and their weights; the first of it where scores are not finite."""
        if not finite:
            return [(torch.arange(whole), torch.ones(whole, dtype=torch.float64)) for whole in wholes]
        parts = list(starmap(slice, pairwise(accumulate(seen.parts, initial=0))))
        found = [self._rows(seen, p, own, share, m) for m, (p, own) in enumerate(zip(parts, owns, strict=True))]
        stands = torch.cat([seen.weights[part][rows] for part, (rows, _) in zip(parts, found, strict=True)])
        weights = self.sampler.weigh(torch.cat([weights for _, weights in found]) * stands) / stands
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

    def _score(
        self, step: Step, planned: Pool, pools: list[PooledBatches]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Give the scores of all pools together, the items of each batch of each, and where texts end, if anywhere.

        All are float64, on the CPU.
        """
        scale, scorer, batch_size = self.objective.scale, self.scorer, self.facts.batch_size
        assert scale is not None
        # A stream may end sooner on one rank than on another, and a sharded model waits in each pass for all.
        waits = self.waits_in_passes and self.feed.streaming
        passes = scorer.passes(planned.size, pools[0], batch_size, planned.varies) if waits else 0
        scores = [scorer(p, scorer.largest_pass(p.in_lengths, batch_size, planned.varies), passes) for p in pools]
        batches = [batch for pool in pools for batch in pool.batches]
        items = torch.stack([scale.items(batch) for batch in batches])
        lengths = [lengths_of(batch, self.feed.padding) for batch in batches]
        known = [one for one in lengths if one is not None]
        # The one wait for the device of an importance step: all comes to the host together.
        step.send([*scores, items, *(known if len(known) == len(lengths) else [])])
        found = step.read()
        on_host, counts, ends = torch.cat(found[: len(pools)]), found[len(pools)], found[len(pools) + 1 :]
        scorer.check(on_host)
        sizes = [len(pool) for pool in pools]
        ends = list(torch.cat(ends).long().split(sizes)) if ends else []
        return on_host, list(counts.split([len(pool.sizes) for pool in pools])), ends

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
