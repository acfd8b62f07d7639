"""What scoring an example costs against training one, κ, measured on the machine that trains, as long as it trains.

    κ = (waiting for an example + scoring it) / (waiting for an example + training on it)

Both sides of it are timed in one step, as a *pair*: while nothing is scored, in uniform steps and in those by memory,
a batch is scored for its time alone just before it is trained on; while pools are scored anyway these are held
against the training pass of their own step. So whatever slows the machine, and however long the inputs are, falls on
both. κ is the median of the last nine pairs; the first five steps give one each, then one step gives one as often as
that costs half a percent of the run, and at most every sixteenth. So κ follows a change of load, or of lengths,
within a few pairs.

On an accelerator the times are those between events on its stream, which hold what the device spent idle for data or
for the host; they are read where the step's figures are, once a pair. On a CPU the times are the process's own, all of
its threads together: what other programs do is not in them. Nor is what the workers of a loader do; where there are
any, waiting for them counts by the wall clock, as if all threads waited.

A smaller batch does not train in proportion: launching kernels and the like take what they take. The share of a whole
batch's training pass that does not shrink is the overhead α::

    time of n examples = time of b examples * (alpha + (1 - alpha) * n / b)

It is measured in the first steps by importance, and anew where they begin again, as often as that costs half a
percent. What a whole batch would have taken is known by scoring one in the same step, which takes κ of it: α is a
small difference, and whole batches of other steps met another load. These steps also say what scoring takes in pools,
drawing included, over scoring one batch: a factor for all pairs made by single batches.

All of it is added up over ranks, in the collective of the step where it has one, and saved: a resumed run goes on with
what the checkpoint holds, before κ is known too. Where κ is given nothing is timed, and a run can be repeated exactly.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from hf_importance.batches.entries import batch_size_of
from hf_importance.checkpoint.schema import COUNT, listed, number, optional
from hf_importance.ranks import Ranks
from hf_importance.theory.costs import ASSUMED_KAPPA
from hf_importance.transfer import Mark, mark, seconds_between

logger = logging.getLogger(__name__)

FEWEST_PAIRS = 5  # before κ is believed: two of them may be as slow as they like (allocation, kernels, compilation)
PAIRS = 9  # the most recent ones, whose median is κ; and as many steps on few examples say what α is
PROBE_SHARE = 0.005  # of a run that its probes may take, after the first; and those for α
PAIR_EVERY = 16  # steps at least from one pair to the next, after the first
# Of a batch's examples, to measure by what a step costs that does not shrink with them.
FEW = 0.75

_RATIO = number(-1e6, 1e6)


@dataclass
class ClockState:
    """What was measured, over all ranks; it goes into the checkpoint."""

    next_pair: Annotated[int, COUNT] = 0  # optimizer steps done before the next pair
    pairs: Annotated[list[float], listed(_RATIO)] = field(default_factory=list)  # κ of each, over the factor
    probed: bool = False  # whether any of them is by a single batch
    # Of steps on few examples: α, and κ by their pools.
    few: Annotated[list[float], listed(_RATIO)] = field(default_factory=list)
    pools: Annotated[list[float], listed(_RATIO)] = field(default_factory=list)
    next_overhead: Annotated[int, COUNT] = 0  # optimizer steps done before α is measured anew
    factor: Annotated[float, number(1e-3, 1e3)] = 1.0  # κ by pools over that by single batches
    overhead: Annotated[float | None, optional(number(0, 0.99))] = None


@dataclass
class Times:
    """Of one step on this rank.

    Attributes:
        asked: When it asked for its data.
        pair: Whether it gives a pair.
        read: Whether its times are read: for a pair, for α, or because that costs nothing. The same on all ranks.
        spans: Of waiting, scoring, its first training pass, and beside a pool of scoring a batch for its time alone:
            beginning, end, and for how many examples.
        own: Of a step by pools: examples that the first training pass would have had, else 0.
    """

    asked: Mark
    pair: bool = False
    read: bool = False
    spans: dict[str, tuple[Mark, Mark, int]] = field(default_factory=dict)
    own: int = 0


class Clock:
    """Times steps while anything goes by κ.

    Args:
        device: Where the model is.
        ranks: Which take the same values as measured.
        accumulation: Micro-batches of a step, of which a probe scores one.
        workers: Whether others load the data.

    Attributes:
        times: Of the step in progress, where they are taken.
        state: What was measured.
    """

    def __init__(self, device: torch.device, ranks: Ranks, accumulation: int = 1, workers: bool = False) -> None:
        self.device, self.ranks = device, ranks
        self.times: Times | None = None
        self.state = ClockState()
        self._accumulation, self._workers = accumulation, workers
        self._given: float | None = None

    def give(self, kappa: float) -> None:
        """Take κ as known: nothing is timed."""
        self._given = kappa

    @property
    def kappa(self) -> float:
        """κ, in ``[0.001, 0.99]``: the paper's 1/3 until it is measured."""
        if self._given is not None:
            return self._given
        if not self.measured:
            return ASSUMED_KAPPA
        return min(max(self.state.factor * statistics.median(self.state.pairs), 0.001), 0.99)

    @property
    def measured(self) -> bool:
        """Whether it is, or was given."""
        return self._given is not None or len(self.state.pairs) >= FEWEST_PAIRS

    @property
    def overhead(self) -> float | None:
        """α, in ``[0, 0.99]``; None until it is measured."""
        return self.state.overhead

    # ---- A step ----

    def begin_step(self) -> None:
        """The step asks for its data now."""
        self.times = Times(self._waiting()) if self._given is None else None

    def goes_on(self, wanted: bool) -> None:
        """The last step was taken in, so that it is known whether anything goes by what scoring costs, and not before.

        Args:
            wanted: Whether it does. Else this step is not timed.
        """
        self.times = self.times if wanted else None

    def probe(self, step: int, examples: int, score: Callable[[], int]) -> None:
        """In a step without pools, whose data has come: where a pair is due, time a scoring pass.

        Args:
            step: Optimizer steps before it.
            examples: Of the step on this rank.
            score: Scores the micro-batch that it trains on first, and gives the number of its examples.
        """
        times = self.times
        if times is None:
            return
        times.pair = step >= self.state.next_pair
        times.read = times.pair or self.device.type == "cpu"
        times.spans["wait"] = times.asked, self._waiting(), examples
        if times.pair:
            start = mark(self.device)
            scored = score()
            times.spans["score"] = start, mark(self.device), scored

    @contextlib.contextmanager
    def scoring(self, step: int, examples: int, own: int, share: float, probe: Callable[[], int]) -> Iterator[None]:
        """Time the scoring and drawing of pools, whose examples have come.

        Args:
            step: Optimizer steps before it.
            examples: Of the pools on this rank.
            own: Of the first micro-batch as it came.
            share: Of it, that is to be kept.
            probe: Scores a micro-batch as it came, for its time alone, and gives the number of its examples.
        """
        times, overhead = self.times, self._measures_overhead(share)
        if times is not None:
            times.own, times.pair = own, step >= self.state.next_pair
            times.read = times.pair or overhead
        if times is None or not times.read:
            yield
            return
        times.spans["wait"] = times.asked, self._waiting(), examples
        start = mark(self.device)
        if overhead:
            probed = probe()
            times.spans["probe"] = start, (start := mark(self.device)), probed
        yield
        times.spans["score"] = start, mark(self.device), examples

    @contextlib.contextmanager
    def training_on(self, inputs: Any) -> Iterator[None]:
        """Time the first training pass of a step whose times are read."""
        times = self.times
        if times is None or not times.read or "train" in times.spans:
            yield
            return
        start = mark(self.device)
        yield
        times.spans["train"] = start, mark(self.device), batch_size_of(inputs)

    # ---- What it says ----

    def read(self, times: Times | None) -> list[float]:
        """Give this rank's figures of a finished step, to be added up over ranks; always as many, or none.

        On an accelerator it waits for the step to have been trained on.
        """
        if times is None or not times.read:
            return []
        nothing = (0.0, 0.0, 0)
        spans = [times.spans.get(part, nothing) for part in ("wait", "score", "train", "probe")]
        figures = [
            figure for start, end, examples in spans for figure in (seconds_between(start, end), float(examples))
        ]
        return [*figures, float(times.own)]

    def learn(self, step: int, times: Times | None, sums: list[float]) -> None:
        """Take in what :meth:`read` gave of a step, over all ranks."""
        if times is None or not sums:
            return
        wait, waited, score, scored, train, trained, probe, probed, own = sums
        if not (waited and trained and train > 0):  # or a clock too coarse for so small a step
            return
        state, waiting, scoring = self.state, wait / waited, score / scored if scored else 0.0
        if own == 0:
            training = train / trained
            state.probed = state.probed or scored > 0
            if len(state.few) == PAIRS and step >= state.next_overhead:
                state.few, state.pools = [], []
        elif probed and trained <= FEW * own:  # more where its scores were not finite
            whole = (waiting + probe / probed) / statistics.median(state.pairs)  # waiting and training
            if whole > waiting:
                share, took = trained / own, train / own / (whole - waiting)
                state.few.append((took - share) / (1 - share))
                state.pools.append((waiting + scoring) / whole)
            if len(state.few) == PAIRS:
                self._settle(step)
            return
        else:
            overhead = state.overhead or 0.0
            training = train / (own * overhead + (1 - overhead) * trained)
        if times.pair and scored:
            ratio = (waiting + scoring) / (waiting + training)
            known = self.measured
            state.pairs = [*state.pairs, ratio / (state.factor if own else 1.0)][-PAIRS:]
            state.next_pair = step + self._pause(probes=own == 0)
            if self.measured and not known:
                logger.info("Scoring an example takes %.3f of training on one.", self.kappa)

    def _pause(self, probes: bool) -> int:
        """Give the steps from one pair to the next: the first come one behind the other."""
        if not self.measured:
            return 1
        return max(PAIR_EVERY, math.ceil(self.kappa / (PROBE_SHARE * self._accumulation)) if probes else 0)

    def _measures_overhead(self, share: float) -> bool:
        """Whether a step that keeps this share of a batch says what α is; κ comes first."""
        return self.measured and share <= FEW and len(self.state.few) < PAIRS and self.state.probed

    def _settle(self, step: int) -> None:
        state = self.state
        state.next_overhead = step + math.ceil(PAIRS * self.kappa / (PROBE_SHARE * self._accumulation))
        state.overhead = min(max(statistics.median(state.few), 0.0), 0.99)
        kappa = statistics.median(state.pools)
        if state.pairs and min(state.pairs) > 0:
            state.factor = min(max(kappa / statistics.median(state.pairs), 1e-3), 1e3)
        logger.info(
            "In steps on few examples, scoring one takes %.3f of training on one, and %.3f of a training pass does "
            "not shrink.",
            kappa,
            state.overhead,
        )

    # ---- Time ----

    def _waiting(self) -> Mark:
        """Give a point in time to measure from what waiting for data takes."""
        if self.device.type == "cpu" and self._workers:
            return time.perf_counter() * torch.get_num_threads()
        return mark(self.device)
