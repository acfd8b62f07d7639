"""What steps found: taken in once they are done, in one place, and said in the log.

:meth:`Ledger.commit` is the only place where anything that is saved, or that decides, changes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import COUNT, choice, listed, number, optional
from hf_importance.objective.loss import Objective
from hf_importance.objective.precision import AS_TRAINING
from hf_importance.objective.proof import describe
from hf_importance.objective.prove import judge
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report, outcome
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed
from hf_importance.run.pools import NO_ITEMS, compared_in, figures, figures_of
from hf_importance.run.step import WHAT_TO_DO, Step, Watch
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Sampler, Scored
from hf_importance.theory.tau import tau_from_sums

logger = logging.getLogger(__name__)

_SUM = number(0, 1e300)
MICRO_BATCHES = 1 << 20  # that a rank's step has at most
OTHER_LOSS = "the loss is another than the model's head says ({found}). {what}"
ELSEWHERE = "another rank found what stands in the way, and says what"


@dataclass
class RunState:
    """What steps change, whatever the sampler; it goes into the checkpoint."""

    tau: Annotated[float, number(1 - 1e-6, 1e9)] = 1.0  # moving average of τ: at first nothing to win
    switches: Annotated[int, COUNT] = 0
    switched: Annotated[int, COUNT] = 0  # optimizer steps done at the last of them
    steps_on: Annotated[int, COUNT] = 0  # optimizer steps drawn by importance
    largest_tau: Annotated[float, number(1 - 1e-6, 1e9)] = 1.0
    lowest_cost: Annotated[float | None, optional(number(0, 1e9))] = None  # of those that the sampler gave
    drawn: bool = False  # whether the last step was
    items: Annotated[float, _SUM] = 0.0  # of the loss, in uniform steps and pools since the start
    examples: Annotated[float, _SUM] = 0.0  # examples in them
    compared: Annotated[list[float], listed(_SUM)] = field(default_factory=list)  # filled in when it is saved
    proven: bool = False  # whether the loss was seen to be what its head says, and never not to be
    # What scoring was measured to be cheapest in, where that is measured.
    scoring_dtype: Annotated[str | None, optional(choice("bf16", "fp16", AS_TRAINING))] = None


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
        self.compared = partial(compared_in, self.sampler)  # read once it has come, with the next step's scores
        self._end: dict[str, float] | None = None  # what the finished run came to

    def begin(self, step: Step | None) -> Step | None:
        """A step begins; None: one that is nobody's business, since importance sampling is off for good."""
        self.step = self.watch.step = step
        if step is not None:
            step.doubted, step.compared = not self.state.proven, self.compared
            step.times = self.clock.times
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
        step, seen, own, summed, timed = self.step, None, [], [], []
        done = step is not None and step.number < self.facts.step()
        if done:
            step.problem = self.problem or step.problem
            past = self.watch.steps_outside(step)
            step.problem = step.problem if past else step.complaint(self.watch.own_code)
            if self.watch.judges(step):
                seen, own = (None, self._nothing(step, past=1.0)) if past else self._found(step)
            self.problem = step.problem
            timed = self.clock.read(step.times)
        adding = counting is not None and self.ranks.averaged > 1
        if own or timed or adding:
            *found, items = self.ranks.sum([*own, *timed, float(counting) if adding else 0.0])
            summed, timed = found[: len(own)], found[len(own) :]
            counting = items if adding else counting
        if done:
            self.begin(None)
            self.clock.learn(step.number, step.times, timed)
            self._take_in(step, seen, summed)
        return counting

    def _found(self, step: Step) -> tuple[Scored | None, list[float]]:
        """Read what training passes left, and give this rank's figures of it; the last five are the verdict."""
        if step.problem is not None:
            return None, self._nothing(step, against=1.0)
        assert self.objective.scale is not None
        found = step.read() if step.kind != "pool" else []  # a pool's was read when it was scored
        # A step of several micro-batches has several sums of weights, and a visit could not be taken back.
        learns = step.kind != "visits" and not self.objective.accumulates
        read = step.evidence[: len(step.figures)]
        against, proof, step.news = judge(step.figures, read, self.objective.weights, learns)
        if against is not None:
            step.problem = OTHER_LOSS.format(found=describe(against), what=WHAT_TO_DO)
        whole = self.objective.weights.state.whole
        judged = [*map(float, (step.problem is not None, proof, bool(step.news), False, whole))]
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
        totals = empty, float(items.sum()), float(len(scores))
        return seen, [*figures(self.sampler, seen, step.compared()), *totals, *judged]

    def _nothing(self, step: Step, against: float = 0.0, past: float = 0.0) -> list[float]:
        """Give the figures of a step that teaches nothing."""
        figures = 0 if step.kind == "pool" else figures_of(self.sampler, self.table)
        return [*[0.0] * figures, against, 0.0, 0.0, past, 0.0]

    def _take_in(self, step: Step, seen: Scored | None, summed: list[float]) -> None:
        before = self.drawing()
        self.state.drawn = step.drawn
        self.state.steps_on += step.drawn
        assert step.place is not None
        self.feed.state = step.place
        self.report.step(step.drawn)
        against, proof, news, past, whole = summed[-5:] if summed else (0.0,) * 5
        if against > 0 or (step.problem is not None and self.ranks.size == 1):
            self.bar(step.problem)
        elif past > 0:
            self.objective.weights.state.outside = True
        else:
            self.state.proven = self.state.proven or proof > 0
            self.objective.weights.state.whole |= whole > 0
            if step.kind == "pool":
                self._learn(step, step.pool, step.sums)
            elif seen is not None:
                self._learn(step, seen, summed[:-5])
            self._learn_weights(step, news > 0)
        self.compared = partial(compared_in, self.sampler, step.kept, step.heard)
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
            own = len(measured) - len(compared_in(self.sampler))
            self.sampler.learn_compared(measured[own:])
            self.sampler.learn(tau, measured[:own])
            self._note()
        if step.represents is None:
            self.state.items += items
            self.state.examples += examples

    def _note(self) -> None:
        """Note how far it came, for the end of the run."""
        state, cost = self.state, self.sampler.cost
        state.largest_tau = max(state.largest_tau, state.tau)
        state.lowest_cost = min((one for one in (state.lowest_cost, cost) if one is not None), default=None)

    def _learn_weights(self, step: Step, news: bool) -> None:
        """Take in what a step told of class weights. All ranks must come to it."""
        weights = self.objective.weights
        if news:
            self.state.proven = False  # with these weights
            told = torch.cat([torch.empty((0, 6), dtype=torch.float64), *step.news])
            told[:, 3] += self.ranks.rank * MICRO_BATCHES
            if not weights.learn(self.ranks.gather(told)):
                self.bar(OTHER_LOSS.format(found="class weights do not explain it on all ranks", what=WHAT_TO_DO))
                return
        if self.table is not None:
            weights.count(step.labels)
        weights.settle(step.number % max(self.facts.updates, 1), self.facts.updates, step.kind == "batch")
        self.objective.score_apart()

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
            how, step, tau = "off" if now is None else "on", self.facts.step(), self.state.tau
            logger.info("Importance sampling %s after step %d: tau %.3f, %s.", how, step, tau, what)

    def log_entries(self) -> dict[str, float]:
        """Give the entries of a training log. All ranks must call it."""
        self.commit()
        active, state = self.drawing() is not None, self.state
        cost = self.sampler.cost
        method = self.sampler.log_entries() | ({} if cost is None else {"relative_cost": cost})
        method |= {"switched_at": state.switched} if state.switches else {}
        return self.report.drain(state.tau, active, state.switches, method)

    def summary(self) -> dict[str, float]:
        """Give the metrics of the finished run. All ranks must call it."""
        self.commit()
        if self.table is not None:
            self.table.exchange()
        found: dict[str, float] = {"largest_tau": self.state.largest_tau, **self.sampler.outcome()}
        found |= {"kappa": self.clock.kappa} if self.clock.measured else {}
        found |= {} if self.state.lowest_cost is None else {"lowest_cost": self.state.lowest_cost}
        found |= {name: value for name, value in self.sampler.log_entries().items() if name == "tau_threshold"}
        found |= {} if self.watch.barred is None else {"ruled_out": 1.0}
        self._end = self.report.summary(self.state.steps_on, found)
        return self._end

    def say_how_it_went(self) -> None:
        """Print one sentence on how the finished run went: the sampler's own, where it has one."""
        if self.ranks.rank == 0 and self._end is not None:
            print(self.sampler.sentence() or outcome(self._end, self.facts.step()))

    def status(self) -> tuple[float, float | None, str, str, int]:
        """Give what the progress bar says, in the order of :class:`.Status`."""
        if self.watch.barred is not None:
            return self.state.tau, None, "for this run", "off", self.state.switched
        return self.state.tau, self.sampler.cost, self.sampler.status(), self.drawing() or "off", self.state.switched
