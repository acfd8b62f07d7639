"""Steps by fresh scores: pools are put together, scored in a forward pass without gradients, and a part is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import WEIGHTS, batch_size_of, index_of, without_index
from hf_importance.batches.lengths import lengths_on_device, lengths_on_host
from hf_importance.batches.pool import PooledBatches, merge_rows, not_rows, stand_for
from hf_importance.batches.random import isolated_rng, key_to_seed
from hf_importance.batches.reserve import split_like
from hf_importance.batches.visits import Order, visit_batches
from hf_importance.heads.class_weights import CUTS
from hf_importance.objective.loss import Objective
from hf_importance.objective.precision import Precision
from hf_importance.objective.scorer import Scorer
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report, Totals
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed, Handed
from hf_importance.run.step import Step
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored
from hf_importance.transfer import Fetched, Preparation, to_device

# Share of the mean that every score of the user's own is raised by.
FLOOR = 0.01
NO_ITEMS = (
    "step {step}: every label of a batch is ignored (-100), so its loss is 0 / 0. Remove such examples from "
    "train_dataset, or see whether the data_collator should have made labels for them"
)


def figures(sampler: Sampler, seen: Scored, compared: Sequence[float]) -> list[float]:
    """Give Σ w, Σ w Ĝ, Σ w Ĝ² (w is 1 of uniform draws), what the sampler measures, and what it compared before."""
    w, scores = seen.weights, seen.scores
    sums = [float(w.sum()), float((w * scores).sum()), float((w * scores.square()).sum())]
    return [*sums, *sampler.measure(seen), *compared]


def compared_in(sampler: Sampler, kept: Tensor | None = None, heard: Fetched | None = None) -> list[float]:
    """Hold the scores of what a step kept of a pool against those that its training passes found, if it did."""
    scored, weights = torch.empty((2, 0), dtype=torch.float64) if kept is None or heard is None else kept
    found = scored if heard is None else torch.cat(heard.read(late=True)) / weights  # they were counted with them
    return list(sampler.compare(scored, found))


def figures_of(sampler: Sampler, table: Table | None) -> int:
    """Give how many figures there are of a step in all: those, and its items."""
    one = torch.ones(1, dtype=torch.float64)
    seen = Scored(one, None if table is None else torch.zeros(1, dtype=torch.int64), 1, 1, one, (1,))
    return len(figures(sampler, seen, compared_in(sampler))) + 3


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
        prepare: Makes a batch what the model takes.
        precision: In which it scores.
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
    prepare: Preparation
    precision: Precision
    waits_in_passes: bool

    def score_and_keep(self, step: Step, planned: Pool, batches: list, iterator: Iterator) -> tuple[list, Tensor]:
        """Replace each micro-batch by examples kept of itself and the reserve.

        Returns:
            The micro-batches, and the items that their loss is divided by; where the step has a problem, on this rank
            or another, nobody trains on them.
        """
        count, own = len(batches), sum(map(batch_size_of, batches))
        filled = self._filled(planned, count)
        with self.report.scoring():
            rest = self.feed.rest_of(planned, count, iterator)
            parts = [without_index(part)[0] for part in [*batches, *rest]]
            step.problem = step.problem or not_rows(parts, [self.objective.rows_in(part) for part in parts])
            step.place = self.feed.where()
            if self._in_the_way(step):
                return batches, torch.tensor(0)
            parts = [*batches, *self.feed.in_passes(rest)]
            pool, raw = self._pooled(parts)
            if self.objective.weights.known:
                self._weigh(step, pool, raw)
            indices = [index for index in map(index_of, parts) if index is not None]
            index = torch.cat(indices) if indices else None
            of_each = planned.kept * count / (filled * self.facts.batch_size)
            timed = len(pool), batch_size_of(batches[0]), of_each, lambda: self.probe(batches[0])
            with self.clock.scoring(step.number, *timed):
                return self._keep(step, planned, pool, raw, index, count, own, filled)

    def score_visits(self, step: Step, planned: Pool, handed: Handed, items: float) -> tuple[list, Tensor]:
        """Score what visits name, and keep a part, as :meth:`score_and_keep`; ``items`` are a uniform example's."""
        count, parts = len(handed.batches), [without_index(batch)[0] for batch in handed.batches]
        with self.report.scoring():
            step.problem = step.problem or not_rows(parts, [self.objective.rows_in(part) for part in parts])
            step.place = self.feed.where()
            if self._in_the_way(step):
                return [], torch.tensor(0)
            of = (handed.index, count, count * self.facts.batch_size, self._filled(planned, count), items)
            return self._keep(step, planned, *self._pooled(handed.batches), *of)

    def _pooled(self, parts: list) -> tuple[PooledBatches, PooledBatches]:
        """Give batches as they are scored, and as the Trainer is to prepare what is kept of them."""
        raw = PooledBatches(
            [to_device(without_index(part)[0], self.clock.device) for part in parts], self.feed.padding
        )
        lengths = [None if self.prepare.overridden else lengths_on_host(part, self.feed.padding) for part in parts]
        pool = PooledBatches([self._prepared(*one) for one in enumerate(raw.batches)], self.feed.padding, lengths)
        return pool, raw if self.prepare.overridden else pool

    def _prepared(self, place: int, batch: Any) -> Any:
        return self.prepare(batch, self.ranks.rank, self.facts.step(), place)

    def _filled(self, planned: Pool, count: int) -> int:
        """Give of how many micro-batches those are that are trained on; on all ranks, which wait for each other."""
        return math.ceil(planned.kept * count / self.facts.batch_size - 1e-9) if self.facts.gathered > 1 else count

    def _weigh(self, step: Step, pool: PooledBatches, raw: PooledBatches) -> None:
        """Give each example the weight that its class has in a uniform batch, on average."""
        head, weights = self.objective.head, self.objective.weights
        assert head is not None
        labels = torch.cat([head.labels(batch) for batch in pool.batches])
        generator = self.facts.generator(self.ranks.rank, self.facts.step(), 0, 10)
        order = torch.stack([torch.randperm(len(labels), generator=generator) for _ in range(CUTS)])
        counted = weights.in_blocks(labels, pool.sizes[0], order).split(pool.sizes)
        for one in (pool, raw):
            one.batches = [{**batch, WEIGHTS: part} for batch, part in zip(one.batches, counted, strict=True)]
        step.labels.append(labels)

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
        pool: PooledBatches,
        given_back: PooledBatches,
        index: Tensor | None,
        count: int,
        own: int,
        filled: int,
        items_each: float | None = None,
    ) -> tuple[list, Tensor]:
        # Where resuming, the Trainer loads the random state behind this: scoring must not move it.
        with isolated_rng(key_to_seed(self.facts.seed, self.ranks.rank, self.facts.step(), 7)):
            scores, items, lengths = self._score(step, planned, pool, count)
        # Visits were scored with the weights that they bring.
        stands = step.represents if step.represents is not None else torch.ones_like(scores)
        seen = step.pool = Scored(scores / stands, index, own, 0, stands, (len(pool),))
        # What a uniform step would have counted in expectation, and what the own batches count.
        counts = [float(items.sum()) * own / len(pool), float(items[:count].sum())]
        counts = counts if items_each is None else [own * items_each] * 2
        # The one collective of an importance step: what will be learned from it, and its items.
        found = [*figures(self.sampler, seen, step.compared()), 0.0, float(items.sum()), float(len(scores))]
        bad = self.ranks.averaged == 1 < self.ranks.size and counts[0] == 0
        expected, of_own, *step.sums, blocked = self.ranks.sum([*counts, *found, float(bad)])
        step.problem = NO_ITEMS.format(step=self.facts.step() + 1) if bad else step.problem
        step.blocked = blocked > 0
        if step.blocked:
            return [], torch.tensor(0)
        finite = math.isfinite(step.sums[1]) and math.isfinite(step.sums[2])
        share = planned.kept / self.facts.batch_size
        if finite:
            rows, weights, number = self._rows(seen, max(round(share * own), filled), filled)
        else:  # all of the own batches is trained on
            rows, filled = torch.arange(sum(pool.sizes[:count])), count
            weights, number = torch.ones(len(rows)), len(rows)
        step.trained = torch.zeros(len(pool)).index_add_(0, rows, weights.float()).double() * stands
        drawn, scale, kept = [], share * own / number, []
        # What each is multiplied by is that of the step, whichever batch it is in. Texts of alike length come
        # together, the long ones in the small batches where the own batches differ in size.
        sizes = sorted(given_back.sizes[:count], reverse=True) if filled == count else [1] * filled
        order = rows.argsort(stable=True) if lengths is None else lengths[rows].argsort(stable=True)
        for part in order.split(split_like(sizes, len(rows)) if finite else given_back.sizes[:count]):
            # A user's _prepare_inputs may have made other columns.
            width = None if self.prepare.overridden or lengths is None else int(lengths[rows[part]].max())
            batch, given = stand_for(given_back, rows[part], weights[part], scale, width)
            drawn.append(batch)
            there = rows[part].sort().values  # as the batch is
            given = given * stands[there]
            kept.append(torch.stack([seen.scores[there], given * scale]))
            self.report.weights(given.float())
        step.kept = torch.cat(kept, 1) if finite and compared_in(self.sampler) else None
        step.left_out = count - filled
        step.counts = Totals(
            examples_scored=len(pool),
            examples_trained=len(rows),
            examples_distinct=len(rows.unique()),
            examples_saved=own - len(rows),
        )
        step_items = share * ([expected, of_own] if self.ranks.averaged > 1 else counts)[0 if finite else 1]
        if step_items == 0 and self.ranks.averaged == self.ranks.size:
            step.problem, step.blocked = NO_ITEMS.format(step=self.facts.step() + 1), True
        step_items = step_items or 1.0  # else all of a rank's own labels are ignored, and its loss is 0
        self.objective.step_items = step_items
        nothing = [merge_rows(drawn[:1], [slice(0, 0)], self.feed.padding)] * step.left_out
        return [*nothing, *drawn], torch.full((), step_items, device=self.clock.device)

    def _rows(self, seen: Scored, kept: int, fewest: int) -> tuple[Tensor, Tensor, int]:
        """Let the sampler keep rows, with weights; others, of weight 0, fill up to ``fewest``. Last, how many did not.

        Ranks wait for each other in each batch, so none may be empty.
        """
        scores = seen.scores
        if callable(self.scorer.score):  # a user's: where it is zero the gradient may be none the less
            scores = scores + FLOOR * scores.mean()
        generator = self.facts.generator(self.ranks.rank, self.facts.step(), 0, 2)
        rows, weights = self.sampler.keep(replace(seen, scores=scores, kept=kept, generator=generator))
        stands = seen.weights[rows]
        weights = self.sampler.weigh(weights * stands) / stands
        missing = max(fewest - len(rows), 0)
        return torch.cat([rows, rows[:1].expand(missing)]), torch.cat([weights, torch.zeros(missing)]), len(rows)

    def _score(
        self, step: Step, planned: Pool, pool: PooledBatches, count: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give the scores of a pool, the items of each of its batches, and where its texts end, if anywhere.

        All are on the CPU, the first two float64.
        """
        scale, scorer, batch_size = self.objective.scale, self.scorer, self.facts.batch_size
        assert scale is not None
        # A stream may end sooner on one rank than on another, and a sharded model waits in each pass for all.
        waits = self.waits_in_passes and self.feed.streaming
        passes = scorer.passes(planned.size, count, pool, batch_size, planned.varies) if waits else 0
        scores = scorer(pool, scorer.largest_pass(pool.in_lengths, batch_size, planned.varies), passes)
        items = torch.stack([scale.items(batch) for batch in pool.batches])
        # The one wait for the device of an importance step: all comes to the host together.
        step.send([scores, items, *lengths_on_device(pool)])
        on_host, counts, *ends = step.read()
        scorer.check(on_host)
        return on_host, counts, torch.cat(ends).long() if ends else pool.lengths

    def probe(self, batch: Any) -> int:
        """Score a batch for its time alone, and give its size; a model that draws random numbers leaves no trace."""
        inputs = self._prepared(0, without_index(batch)[0])
        with isolated_rng(0, self.clock.device):
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
            for place, batch in enumerate(visit_batches(self.feed.loader, order, 0, seed, rank, ranks)):
                if self.objective.weights.known and self.objective.head is not None:
                    batch = self.objective.weights.of_visits(self.objective.head, batch, self.facts.batch_size)
                inputs, index = without_index(batch)
                assert index is not None
                inputs = self._prepared(place, to_device(inputs, self.clock.device))
                found = self.scorer(PooledBatches([inputs], self.feed.padding), self.scorer.batch_size)
                rows.append(torch.stack([index.double(), found.double().cpu()], 1))
            index, found = self.ranks.gather(torch.cat(rows)).T.contiguous()
        self.report.add(Totals(examples_scored=share))
        finite = found.isfinite()
        table.replace(index[finite].long(), found[finite].float(), self.facts.step())
