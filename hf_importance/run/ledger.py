"""What steps found: taken in once they are done, in one place, and said in the log.

:meth:`Ledger.commit` is the only place where anything that is saved, or that decides, changes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import COUNT, listed, number
from hf_importance.objective.loss import Objective
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed
from hf_importance.run.pools import NO_ITEMS, figures, figures_of, nothing_compared
from hf_importance.run.step import Step, Watch
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Sampler, Scored
from hf_importance.theory.tau import tau_from_sums

logger = logging.getLogger(__name__)


_SUM = number(0, 1e300)
ELSEWHERE = "another rank found what stands in the way, and says what"


@dataclass
class RunState:
    """What steps change, whatever the sampler; it goes into the checkpoint."""

    tau: Annotated[float, number(1 - 1e-6, 1e9)] = 1.0  # moving average of τ: at first nothing to win
    switches: Annotated[int, COUNT] = 0
    switched: Annotated[int, COUNT] = 0  # optimizer steps done at the last of them
    steps_on: Annotated[int, COUNT] = 0  # optimizer steps drawn by importance
    drawn: bool = False  # whether the last step was
    items: Annotated[float, _SUM] = 0.0  # of the loss, in uniform steps and pools since the start
    examples: Annotated[float, _SUM] = 0.0  # examples in them
    # What the last step compared, see Sampler.compare, on this rank, until it is in the next one's sum over ranks.
    compared: Annotated[list[float], listed(_SUM)] = field(default_factory=list)
    proven: bool = False  # whether the loss was seen to be what its head says, and never not to be


@dataclass
class Ledger:
    """The step in progress, and what all steps before it add up to; attributes as those of ``Run``.

    Attributes:
        state: What steps add up to.
        step: The one in progress, or done and not committed yet.
        problem: What this rank found to stand in the way, until all ranks have heard of it in their next sum.
    """

    sampler: Sampler
    objective: Objective
    watch: Watch
    feed: Feed
    ranks: Ranks
    clock: Clock
    table: Table | None
    facts: Facts
    report: Report

    def __post_init__(self) -> None:
        """Nothing was done yet."""
        self.state = RunState()
        self.step: Step | None = None
        self.problem: str | None = None
        self.state.compared = nothing_compared(self.sampler)

    def begin(self, step: Step | None) -> Step | None:
        """A step begins; None: one that is nobody's business, since importance sampling is off for good."""
        self.step = self.watch.step = step
        if step is not None:
            step.doubted, step.compared = not self.state.proven, self.state.compared
            self.watch.begin(step)
        return step

    def bar(self, reason: str | None) -> None:
        """From now on the run is the plain Trainer's, also where it is resumed; all ranks must come to it.

        Args:
            reason: What stands in the way, see :meth:`.Watch.bar`; None where only another rank found something.
        """
        self.state.proven = False
        finders = self.ranks.gather_number(int(reason is not None))
        self.watch.bar(reason or ELSEWHERE, self.ranks.rank == finders.index(1))
        if not all(self.ranks.gather_number(int(self.objective.head is not None))):
            self.objective.leave_to_trainer()  # the others count no items either

    # ---- Commit ----

    def commit(self, counting: Tensor | float | None = None) -> Tensor | float | None:
        """Take in what the last step found, once it is done. All ranks must call it.

        Args:
            counting: Items of the step to come on this rank, to be added up in the same collective.

        Returns:
            The same over all ranks, where a count of ours spans them.
        """
        step, seen, own, summed = self.step, None, [], []
        done = step is not None and step.number < self.facts.step()
        if done:
            step.problem = self.problem or step.complaint(self.watch.own_code)
            if self.watch.judges(step):
                seen, own = self._found(step)
            self.problem = step.problem
        adding = counting is not None and self.ranks.averaged > 1
        if own or adding:
            *summed, items = self.ranks.sum([*own, float(counting) if adding else 0.0])
            counting = items if adding else counting
        if done:
            self.begin(None)
            self._take_in(step, seen, summed)
        return counting

    def _found(self, step: Step) -> tuple[Scored | None, list[float]]:
        """Read what training passes left, and give this rank's figures of it; the last two are the verdict."""
        if step.problem is not None:
            return None, [*([] if step.kind == "pool" else [0.0] * figures_of(self.sampler, self.table)), 1.0, 0.0]
        assert self.objective.scale is not None
        found = step.read() if step.kind != "pool" else []  # a pool's was read when it was scored
        against, proof = self.watch.judge(step)
        judged = [max(against, float(step.problem is not None)), proof]
        if step.kind == "pool":
            return None, judged
        sizes = tuple(len(part) for part in found[: len(step.outputs)])
        scores, items = torch.cat(found[: len(sizes)]), torch.cat(found[len(sizes) :])
        indices = [index for _, index, _ in step.outputs if index is not None]
        index = torch.cat(indices) if indices else None
        weights = torch.ones_like(scores)
        if step.given is not None and step.represents is not None:
            scores = scores / step.given  # they were counted with their weights
            weights = step.represents
        self.watch.scorer.check(scores)
        empty = 0.0 if self.objective.scale.over_step else float((items == 0).sum())
        kind = "visits" if step.kind == "visits" else "batch"
        seen = Scored(scores, index, len(scores), len(scores), weights, sizes, kind)
        totals = [empty, float(items.sum()), float(len(scores))]
        return seen, [*figures(self.sampler, seen, step.compared), *totals, *judged]

    def _compare(self, step: Step) -> list[float]:
        """Hold the scores of what was kept against those that its training passes found."""
        if step.kept is None or step.heard is None or step.problem is not None:
            return nothing_compared(self.sampler)
        scored, weights = step.kept
        return list(self.sampler.compare(scored, torch.cat(step.heard.read()) / weights))  # counted with them

    def _take_in(self, step: Step, seen: Scored | None, summed: list[float]) -> None:
        before = self.drawing()
        self.state.drawn = step.drawn
        self.state.steps_on += step.drawn
        assert step.place is not None
        self.feed.state = step.place
        self.report.step(step.drawn)
        against, proof = summed[-2:] if summed else (0.0, 0.0)
        if against > 0 or (step.problem is not None and self.ranks.size == 1):
            self.bar(step.problem)
        else:
            self.state.proven = self.state.proven or proof > 0
            if step.kind == "pool":
                self._learn(step, step.pool, step.sums)
            elif seen is not None:
                self._learn(step, seen, summed[:-2])
        self.state.compared = self._compare(step)
        self.report.add(step.counts)
        self.count_switch(before)

    def _learn(self, step: Step, seen: Scored | None, summed: list[float] | None) -> None:
        assert seen is not None and summed is not None
        count, total, squares, *measured, empty, items, examples = summed
        if empty > 0 or (items == 0 and examples > 0):
            self.bar(NO_ITEMS.format(step=self.facts.step()))
            return
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
            own = len(measured) - len(step.compared)
            if any(measured[own:]):
                self.sampler.learn_compared(measured[own:])
            self.sampler.learn(tau, measured[:own])
        if step.represents is None:
            self.state.items += items
            self.state.examples += examples

    # ---- Switches and the log ----

    def drawing(self) -> str | None:
        """Give what the next steps are drawn by; None: by nothing, they are uniform."""
        on = self.sampler.active and self.state.proven and self.watch.barred is None
        return self.sampler.source if on else None

    def count_switch(self, before: str | None) -> None:
        """Note that importance sampling went on or off, or draws otherwise; the next training log says so.

        An entry of its own would have no loss, which callbacks look for in every entry.
        """
        now = self.drawing()
        if now == before:
            return
        self.state.switches += 1
        self.state.switched = self.facts.step()
        if self.ranks.rank == 0:
            what = ", ".join(f"{name} {value:.3f}" for name, value in self.sampler.log_entries().items())
            logger.info(
                "Importance sampling %s after step %d: tau %.3f, %s.",
                "off" if now is None else "on",
                self.facts.step(),
                self.state.tau,
                what,
            )

    def log_entries(self) -> dict[str, float]:
        """Give the entries of a training log. All ranks must call it."""
        self.commit()
        active, state = self.drawing() is not None, self.state
        method = self.sampler.log_entries()
        if state.switches:
            method["switched_at"] = state.switched
        return self.report.drain(state.tau, active, state.switches, method)

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
        return self.state.tau, self.sampler.status(), self.drawing() or "off"
