"""One training run: asks the sampler, does what it says, and tells it what was found.

A step is a transaction. What it finds lies in one :class:`~hf_importance.run.step.Step`, and :meth:`Run.commit` is
the only place where anything that is saved, or that decides, changes. So a checkpoint in the middle of a step is that
of the step's beginning, by construction. What decides changes only by sums over ranks, or between two steps by what
all ranks know, so all take the same branch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import batch_size_of
from hf_importance.checks import check_batch
from hf_importance.objective.loss import Objective
from hf_importance.objective.scorer import score_outputs
from hf_importance.reporting.report import PREFIX, Report, Totals
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed
from hf_importance.run.pools import NO_ITEMS, Pools, figures
from hf_importance.run.ranks import Ranks
from hf_importance.run.step import RunState, Step
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored
from hf_importance.theory.tau import tau_from_sums

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run of the Trainer, from ``on_train_begin`` on.

    Attributes:
        sampler: Decides.
        objective: The loss.
        feed: Reads batches.
        pools: Scores, and keeps what the sampler says.
        ranks: The processes.
        clock: What scoring costs.
        table: Scores of all examples, where the sampler remembers.
        facts: What the sampler knows.
        report: Counts.
        say: Writes entries to the Trainer's log.
    """

    sampler: Sampler
    objective: Objective
    feed: Feed
    pools: Pools
    ranks: Ranks
    clock: Clock
    table: Table | None
    facts: Facts
    report: Report
    say: Callable[[dict[str, float]], None]

    def __post_init__(self) -> None:
        """Nothing was done yet."""
        self.state = RunState()
        self.step: Step | None = None

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
        if self.table is not None:
            if self.feed.decision_due:
                self.commit()
                self._decide()
            if self.feed.visiting:
                self.commit()
                return self._visit(count)
        self.clock.begin_step(self.sampler.timed)
        batches, items = own(iterator)
        if not batches:
            return batches, items
        if self.facts.step() == 0:
            check_batch(batches[0], self.facts.batch_size)
        self.objective.count(batches)
        counted = self.objective.step_items
        planned = None
        # A pool's figures were summed in its own step: decide first, for it has no need of this sum.
        pooled = self.step is None or self.step.kind == "pool"
        if pooled:
            self.commit()
            planned = self._planned()
        if planned is None:
            # The one collective of a uniform step: what the last one found, and the items of this one.
            self.objective.step_items = self.commit(counting=counted)
            planned = None if pooled else self._planned()
        if planned is None:
            return self._as_they_came(batches, items)
        step = self.step = Step(self.facts.step(), "pool", drawn=True)
        return self.pools.score_and_keep(step, planned, batches, iterator)

    def _planned(self) -> Pool | None:
        self.clock.learn(self.facts.batch_size)
        return self.sampler.pool()

    def _as_they_came(self, batches: list, items: Any) -> tuple[list, Any]:
        sizes = [batch_size_of(batch) for batch in batches]
        self.step = Step(self.facts.step(), "batch", place=self.feed.where())
        self.step.counts = Totals(examples_trained=sum(sizes), examples_distinct=sum(sizes))
        self.clock.probe(sum(sizes), lambda: self.pools.probe(batches[0]))
        for size in sizes:
            self.report.sample_size(size)
        return batches, items

    # ---- Visits ----

    def _decide(self) -> None:
        """Ask for visits. All ranks must call it."""
        assert self.table is not None
        before = self._drawing()
        within = self.feed.visiting and self.feed.place > 0
        self.table.exchange()
        visits = self.sampler.visits()
        if visits is None and within:
            left, examples = self.facts.micro_batches_left, self.facts.examples
            assert examples is not None
            visits = self.feed.uniform_visits(examples, left, self.facts.generator(self.feed.state.draws, 9))
        self.feed.visit(visits)
        self._count_switch(before)

    def _visit(self, count: int) -> tuple[list, Tensor]:
        handed = self.feed.hand_out(count)
        sizes = [len(weights) for weights in handed.weights]
        step = self.step = Step(self.facts.step(), "visits", drawn=not self.feed.visiting_uniformly)
        step.place = self.feed.where()
        step.given, step.represents = torch.cat(handed.weights).double(), handed.represents.double()
        examples = sum(sizes)
        distinct = sum(len(index.unique()) for index in handed.index.split(sizes))
        saved = len(sizes) * self.facts.batch_size - examples
        step.counts = Totals(examples_trained=examples, examples_distinct=distinct, examples_saved=saved)
        for weights in handed.weights:
            self.report.weights(weights)
        # The items that a uniform step of so many examples would have counted.
        items = examples * self.ranks.averaged * self.state.items / self.state.examples
        self.objective.step_items = items
        return handed.batches, torch.tensor(items, device=self.clock.device)

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

    # ---- What training passes leave ----

    @property
    def listens(self) -> bool:
        """Whether the outputs of training passes are to be scored."""
        return self.step is not None and self.step.kind != "pool"

    def saw(self, outputs: Any, batch: dict[str, Any], index: Tensor | None) -> None:
        """Keep, on the device, what the logits of a training pass say."""
        assert self.step is not None and self.objective.head is not None and self.objective.scale is not None
        scores = score_outputs(outputs, batch, self.objective.head, self.pools.scorer.score)
        self.step.outputs.append((scores, index, self.objective.scale.items(batch)))

    # ---- Commit ----

    def commit(self, counting: Tensor | float | None = None) -> Tensor | float | None:
        """Take in what the last step found, once it is done. All ranks must call it.

        Args:
            counting: Items of the step to come on this rank, to be added up in the same collective.

        Returns:
            The same over all ranks, where a count of ours spans them.
        """
        step, seen, figures, summed = self.step, None, [], []
        done = step is not None and step.number < self.facts.step()
        if done and step.kind != "pool" and step.outputs:
            seen, figures = self._found(step)
        adding = counting is not None and self.ranks.averaged > 1
        if figures or adding:
            *summed, items = self.ranks.sum([*figures, float(counting) if adding else 0.0])
            counting = items if adding else counting
        if done:
            self.step = None
            if step.kind == "pool":
                seen, summed = step.pool, step.sums
            self._take_in(step, seen, summed)
        return counting

    def _found(self, step: Step) -> tuple[Scored, list[float]]:
        """Read what training passes left, and give this rank's figures of it."""
        assert self.objective.scale is not None
        scores, index, items = step.read()
        weights = torch.ones_like(scores)
        if step.given is not None and step.represents is not None:
            scores = scores / step.given  # the batch brought its weights along
            weights = step.represents
        empty = 0.0 if self.objective.scale.over_step else float((items == 0).sum())
        sizes = tuple(len(found) for found, _, _ in step.outputs)
        kind = "visits" if step.kind == "visits" else "batch"
        seen = Scored(scores, index, len(scores), len(scores), weights, sizes, kind)
        return seen, [*figures(self.sampler, seen), empty, float(items.sum()), float(len(scores))]

    def _take_in(self, step: Step, seen: Scored | None, summed: list[float] | None) -> None:
        before = self._drawing()
        self.state.drawn = step.drawn
        self.state.steps_on += step.drawn
        assert step.place is not None
        self.feed.state = step.place
        self.report.step(step.drawn)
        if seen is not None and summed:
            self._learn(step, seen, summed)
        self.report.add(step.counts)
        self._count_switch(before)

    def _learn(self, step: Step, seen: Scored, summed: list[float]) -> None:
        count, total, squares, *measured, empty, items, examples = summed
        if empty > 0 or (items == 0 and examples > 0):
            raise ValueError(NO_ITEMS.format(step=self.facts.step()))
        if self.table is not None and seen.index is not None:
            given = step.given if step.given is not None else step.trained
            given = torch.ones_like(seen.scores) if given is None else given
            self.table.add(seen.index, seen.scores, given, self.facts.step())
        tau = tau_from_sums(count, total, squares)
        if math.isnan(tau):
            step.counts.nonfinite_steps += self.ranks.rank == 0
            self.report.warn_of_nonfinite(self.facts.step(), self.state.tau)
            return
        if count:
            momentum = self.sampler.momentum
            self.state.tau = momentum * self.state.tau + (1 - momentum) * tau
            self.sampler.learn(tau, measured)
        if step.kind != "visits":
            self.state.items += items
            self.state.examples += examples

    # ---- Switches and the log ----

    def _drawing(self) -> str | None:
        return self.sampler.source if self.sampler.active else None

    def _count_switch(self, before: str | None) -> None:
        """Tell the log and the reporting backends that importance sampling went on or off, or draws otherwise."""
        now = self._drawing()
        if now == before:
            return
        self.state.switches += 1
        if self.ranks.rank == 0:
            what = ", ".join(f"{name} {value:.3f}" for name, value in self.sampler.log_entries().items())
            logger.info(
                "Importance sampling %s after step %d: tau %.3f, %s.",
                "off" if now is None else "on",
                self.facts.step(),
                self.state.tau,
                what,
            )
        names = {"active": float(now is not None), "switches": self.state.switches, "tau": self.state.tau}
        self.say({PREFIX + name: value for name, value in names.items()})

    def log_entries(self) -> dict[str, float]:
        """Give the entries of a training log. All ranks must call it."""
        self.commit()
        active, state = self.sampler.active, self.state
        return self.report.drain(state.tau, active, state.switches, self.sampler.log_entries())

    def summary(self) -> dict[str, float]:
        """Give the metrics of the finished run. All ranks must call it."""
        self.commit()
        if self.table is not None:
            self.table.exchange()
        kappa = {"kappa": self.clock.kappa} if self.clock.measured else {}
        return self.report.summary(self.state.steps_on, {**kappa, **self.sampler.outcome()})

    def say_how_it_went(self) -> None:
        """Say in one sentence how the finished run went: printed where the sampler has something to say."""
        own, totals = self.sampler.sentence(), self.report.totals
        if self.ranks.rank == 0 and own is not None:
            print(own)
        elif self.ranks.rank == 0 and totals.examples_trained:
            logger.info("%s", totals.sentence())

    def status(self) -> tuple[float, str, str]:
        """Give τ, what it is compared with, and what is on, for the progress bar."""
        return self.state.tau, self.sampler.status(), self._drawing() or "off"
