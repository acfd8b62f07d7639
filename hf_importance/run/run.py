"""One training run: asks the sampler, does what it says, and tells it what was found.

A step is a transaction. What it finds lies in one :class:`~hf_importance.run.step.Step`, and :meth:`.Ledger.commit` is
the only place where anything that is saved, or that decides, changes. So a checkpoint in the middle of a step is that
of the step's beginning, by construction. What decides changes only by sums over ranks, or between two steps by what
all ranks know, so all take the same branch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import INDEX, LENGTHS, WEIGHTS, batch_size_of, index_of, without_index
from hf_importance.batches.pool import merge_rows
from hf_importance.checks import wrong_with_batch
from hf_importance.objective.loss import Objective
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report, Totals
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed, Handed
from hf_importance.run.ledger import Ledger, RunState
from hf_importance.run.pools import Pools
from hf_importance.run.step import Step, Watch
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Pool, Sampler
from hf_importance.transfer import to_device

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run of the Trainer, from ``on_train_begin`` on.

    Attributes:
        sampler: Decides.
        objective: The loss.
        watch: Sees what is trained on.
        feed: Reads batches.
        pools: Scores, and keeps what the sampler says.
        ranks: The processes.
        clock: What scoring costs.
        table: Scores of all examples, where the sampler remembers.
        facts: What the sampler knows.
        report: Counts.
        ledger: Takes in what steps found.
    """

    sampler: Sampler
    objective: Objective
    watch: Watch
    feed: Feed
    pools: Pools
    ranks: Ranks
    clock: Clock
    table: Table | None
    facts: Facts
    report: Report
    ledger: Ledger

    def __post_init__(self) -> None:
        """No batch was seen."""
        self._first = True

    @property
    def state(self) -> RunState:
        """What steps add up to."""
        return self.ledger.state

    @property
    def step(self) -> Step | None:
        """The step in progress, or done and not committed yet."""
        return self.ledger.step

    def commit(self, counting: Tensor | float | None = None) -> Tensor | float | None:
        """Take in what the last step found, once it is done; see :meth:`.Ledger.commit`."""
        return self.ledger.commit(counting)

    # ---- A step ----

    def batches(
        self, epoch_iterator: Iterator, count: int, own: Callable[[Iterator], tuple[list, Any]]
    ) -> tuple[list, Any]:
        """Give the micro-batches of one optimizer step, and the number of items that its loss is divided by.

        Args:
            epoch_iterator: The Trainer's.
            count: Micro-batches that it asks for.
            own: Reads the Trainer's own from an iterator.
        """
        self.objective.step_items = None
        iterator = self.feed.follow(epoch_iterator, count)
        if self.table is not None and self.watch.barred is None:
            given = self._visited(count)
            if given is not None:
                return given
        self.clock.begin_step()
        batches, items = own(iterator)
        if not batches:
            return batches, items
        planned = self._plan(self._counted(batches)) if self.watch.barred is None else None
        if self.watch.barred is not None:
            return self._plainly(batches, items)
        tried = self.pools.precision.known
        if self.state.proven:
            self.pools.precision.try_out(lambda: self.pools.probe(batches[0]))
            self.state.scoring_dtype = self.pools.precision.chosen
        self.clock.goes_on(self.sampler.timed and tried)
        if planned is None:
            return self._as_they_came(batches, items)
        step = self.ledger.begin(Step(self.facts.step(), "pool", drawn=True))
        step.problem = self.ledger.problem
        kept = self.pools.score_and_keep(step, planned, batches, iterator)
        if step.blocked:  # before anything was drawn
            self.ledger.bar(step.problem)
            return self._plainly(batches, items)
        return self._handed(kept)

    def _plan(self, counted: Tensor | float | None) -> Pool | None:
        """Take in the last step, and ask what this one, with so many items on this rank, is to score."""
        planned = None
        # A pool's figures were summed in its own step: decide first, for it has no need of this sum.
        pooled = self.step is None or self.step.kind == "pool"
        if pooled:
            self.commit()
            planned = self._planned()
        if planned is None:
            # The one collective of a uniform step: what the last one found, and the items of this one.
            missing = counted is None and self.ranks.size > 1  # its labels are not what can be counted
            found = self.commit(counting=0.0 if missing else counted)
            self.objective.step_items = None if missing else found
            planned = None if pooled else self._planned()
        return planned

    def _counted(self, batches: list) -> Tensor | float | None:
        """Count the items of the Trainer's own batches, once they are seen to be what can be drawn from."""
        first, self._first = self._first, False
        problem = None
        try:
            problem = wrong_with_batch(batches[0], self.facts.batch_size) if first else None
            if problem is None:
                self.objective.count(batches)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            problem = f"{error}"
        at_once = first or self.ranks.size == 1
        if at_once and any(self.ranks.gather_number(int(problem is not None))):
            self.ledger.bar(problem)
        elif problem is not None:  # this step is a uniform one in any case, and the others hear of it behind it
            self.ledger.problem = self.ledger.problem or problem
        return self.objective.step_items

    def _plainly(self, batches: list, items: Any) -> tuple[list, Any]:
        """Give the Trainer's own batches of a run in which importance sampling is off for good."""
        self.ledger.begin(None)
        self.objective.count_where_repaired(batches)
        if self.objective.step_items is not None and self.ranks.averaged > 1:
            (self.objective.step_items,) = self.ranks.sum([float(self.objective.step_items)])
        return [without_index(batch)[0] for batch in batches], items

    def _planned(self) -> Pool | None:
        return self.sampler.pool() if self.state.proven and self.watch.barred is None else None

    def _handed(self, given: tuple[list, Any]) -> tuple[list, Any]:
        """Take out of the batches what is ours: neither a model nor a hook of the user's is to meet it."""
        batches, items = given
        assert self.step is not None
        ours = (WEIGHTS, INDEX, LENGTHS) if self.step.kind != "batch" else (INDEX, LENGTHS)
        self.step.rows = [self.objective.rows_in(batch) for batch in batches]
        self.step.micro = [(batch.get(WEIGHTS) if WEIGHTS in ours else None, index_of(batch)) for batch in batches]
        return [_without(batch, ours) for batch in batches], items

    def _as_they_came(self, batches: list, items: Any) -> tuple[list, Any]:
        sizes = [batch_size_of(batch) for batch in batches]
        step = self.ledger.begin(Step(self.facts.step(), "batch", place=self.feed.where()))
        step.counts = Totals(examples_trained=sum(sizes), examples_distinct=sum(sizes))
        self.clock.probe(step.number, sum(sizes), lambda: self.pools.probe(batches[0]))
        for size in sizes:
            self.report.sample_size(size)
        return self._handed((batches, items))

    # ---- Visits ----

    def _visited(self, count: int) -> tuple[list, Any] | None:
        """Give the micro-batches of a step of visits, where such run or begin."""
        if self.feed.decision_due:
            self.commit()
            self._decide()
        if not self.feed.visiting:
            return None
        self.clock.begin_step()
        self.commit()
        self.clock.goes_on(self.sampler.timed and self.pools.precision.known)
        return self._visit(count) if self.watch.barred is None else None

    def _decide(self) -> None:
        """Ask for visits. All ranks must call it."""
        assert self.table is not None
        if not self.state.proven or self.watch.barred is not None:
            return
        before = self.ledger.drawing()
        within = self.feed.visiting and self.feed.place > 0
        self.table.exchange()
        weights = self.objective.weights
        if weights.known:
            weights.share_counts(self.ranks.sum(weights.state.recent))
        visits = self.sampler.visits()
        if visits is None and within:
            left, examples = self.facts.micro_batches_left, self.facts.examples
            assert examples is not None
            visits = self.feed.uniform_visits(examples, left, self.facts.generator(self.feed.state.draws, 9))
        if visits is not None and visits.micro_batches > self.facts.micro_batches_left:
            raise ValueError(
                f"{type(self.sampler).__name__} names visits for {visits.micro_batches} micro-batches, and the epoch "
                f"has {self.facts.micro_batches_left} left: give as many at most, so that epochs stay the Trainer's."
            )
        self.feed.visit(visits)
        self.ledger.count_switch(before)

    def _visit(self, count: int) -> tuple[list, Tensor] | None:
        handed, weights = self.feed.hand_out(count), self.objective.weights
        head = self.objective.head
        if weights.known and head is not None:
            handed.batches = [weights.of_visits(head, batch, self.facts.batch_size) for batch in handed.batches]
        visits = self.feed.state.visits
        if visits is not None and visits.kept is not None:
            return self._visit_pools(handed, Pool(math.ceil(visits.batch_size), visits.kept, varies=True))
        sizes = [len(weights) for weights in handed.weights]
        step = self.ledger.begin(Step(self.facts.step(), "visits", drawn=not self.feed.visiting_uniformly))
        step.place, step.left_out = self.feed.where(), handed.left_out
        step.given, step.represents = torch.cat(handed.weights).double(), handed.represents.double()
        examples = sum(sizes)
        distinct = sum(len(index.unique()) for index in handed.index.split(sizes))
        saved = (handed.left_out + len(sizes)) * self.facts.batch_size - examples
        step.counts = Totals(examples_trained=examples, examples_distinct=distinct, examples_saved=saved)
        for weights in handed.weights:
            self.report.weights(weights)
        # The items that a uniform step of so many examples would have counted.
        items = examples * self.ranks.averaged * self.state.items / self.state.examples
        self.objective.step_items = items
        device = self.clock.device
        nothing = [merge_rows(handed.batches[:1], [slice(0, 0)], self.feed.padding)] * handed.left_out
        batches, count = self._handed(([*nothing, *handed.batches], torch.full((), items, device=device)))
        batches = [to_device(batch, device) for batch in batches]  # as the Trainer's loader does
        self.clock.probe(step.number, examples, lambda: self.pools.probe(batches[step.left_out]))
        return batches, count

    def _visit_pools(self, handed: Handed, planned: Pool) -> tuple[list, Tensor] | None:
        """Score what visits name, and keep a part; None where importance sampling is off for good from now on."""
        step = self.ledger.begin(Step(self.facts.step(), "pool", drawn=True, represents=handed.represents.double()))
        kept = self.pools.score_visits(step, planned, handed, self.state.items / self.state.examples)
        if step.blocked:
            self.ledger.bar(step.problem)
            return None
        return self._handed(kept)

    def up_to_date_table(self) -> Table | None:
        """Give the table, if there is one, with all that was found in it; on several ranks as they last exchanged it.

        That is at the last decision, and where the run has ended at its end, so that a rank may ask alone.
        """
        if self.table is not None and self.ranks.size == 1:
            self.commit()
            self.table.exchange()
        return self.table

    def score_all(self) -> None:
        """Score every example anew into the table; see ``Facts.score_all``."""
        assert self.table is not None
        self.pools.score_all(self.table)


def _without(batch: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    """Give a batch without some entries; itself where it has none of them."""
    if not any(name in batch for name in names):
        return batch
    return {name: value for name, value in batch.items() if name not in names}
