"""What scoring an example costs against training one, κ, measured on the machine that trains, data included.

    κ = (waiting for an example + scoring it) / (waiting for an example + training on it)

Each part is timed for a few batches. On an accelerator the times are those between events on its stream, and the
median counts: they cost no wait, and hold what the device spent idle for data or for the host, and nothing of what ran
while it was busy. On a CPU the fastest counts, for other programs make some batches slow and none fast. They are read
once, when there are enough of them. From then on κ stays as it is: it goes into the checkpoint, and a resumed run
decides the same.

The first steps by importance are timed as well, for what a single batch could not show. Their pools say what scoring
takes, drawing included, in place of the batches before them. And a smaller batch does not train in proportion:
launching kernels, clipping and the like take what they take. That share of a whole batch's time is the overhead α::

    time of n examples = time of b examples * (alpha + (1 - alpha) * n / b)

The whole batches that they are held against are the last before them: a machine may have become slower since the run
began.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

import torch

from hf_importance.batches.entries import batch_size_of
from hf_importance.checkpoint.schema import number, optional
from hf_importance.ranks import Ranks
from hf_importance.theory.costs import ASSUMED_KAPPA

logger = logging.getLogger(__name__)

Part = Literal["wait", "score", "train", "pool wait", "pool", "few"]
Mark = float | torch.Event | None
KAPPA_PARTS: tuple[Part, ...] = ("wait", "score", "train")
FEW_PARTS: tuple[Part, ...] = ("pool wait", "pool", "few")

WARM_UP = 1  # batches of each part that are not counted: allocation, choice of kernels, compilation
SAMPLES = 5  # the most recent batches of each part, which are
FEW_SAMPLES = 9  # the same of steps by importance, which cost nothing to time
# Of a batch's examples, to measure by what a step costs that does not shrink with them.
FEW = 0.75


@dataclass
class ClockState:
    """What was measured, None where it was not yet; it goes into the checkpoint."""

    kappa: Annotated[float | None, optional(number(0.001, 0.99))] = None
    training_seconds: Annotated[float | None, optional(number(0, 1e6))] = None
    overhead: Annotated[float | None, optional(number(0, 0.99))] = None


class Clock:
    """Times batches until there are enough of them, and then knows κ.

    Args:
        device: Where the model is.
        ranks: Which take the same values as measured.

    Attributes:
        kappa: κ, in ``[0.001, 0.99]``: the paper's 1/3 until it is measured.
        measured: Whether it is.
        training: Seconds that training on an example of a whole batch took, data included; None where unknown.
        overhead: α, in ``[0, 0.99]``; None until it is measured.
    """

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self.kappa = ASSUMED_KAPPA
        self.measured = False
        self.training: float | None = None
        self.overhead: float | None = None
        self._times: dict[Part, deque] = {
            part: deque(maxlen=WARM_UP + (FEW_SAMPLES if part in FEW_PARTS else SAMPLES)) for part in get_args(Part)
        }
        # When the step in progress asked for its data, and as what its training is timed once κ is known: on so few
        # examples that its time says what does not shrink with them, on whole uniform batches, or not at all.
        self._asked: Mark = None
        self._timed_as: Part | None = None
        self._wanted = False

    # ---- A step ----

    def begin_step(self, wanted: bool) -> None:
        """The step asks for its data now.

        Args:
            wanted: Whether anything goes by what scoring costs.
        """
        self._wanted, self._timed_as = wanted, None
        self._asked = self._mark() or self._mark(later=True)

    def probe(self, examples: int, score: Callable[[], int]) -> None:
        """In a uniform step, whose data has come: time a scoring pass too, while a decision waits for κ.

        Args:
            examples: Of the step on this rank.
            score: Scores a batch and gives the number of its examples.
        """
        self._timed_as = "train"
        if self._asked is None:
            return
        self._add("wait", self._asked, examples)
        if self._lacks("score"):
            mark = self._mark()
            self._add("score", mark, score())

    @contextlib.contextmanager
    def scoring(self, examples: Callable[[], int], share: float) -> Iterator[None]:
        """Time the scoring and drawing of pools, whose examples have come.

        Args:
            examples: Gives the number of those in the pools.
            share: Of a batch, that is kept.
        """
        wait, score = ("pool wait", "pool") if self.measured else ("wait", "score")
        self._timed_as = "few" if share <= FEW else None
        self._add(wait, self._asked, examples())
        mark = self._mark(later=self.measured)
        yield
        self._add(score, mark, examples())

    def whole_batch(self) -> None:
        """After all, the batches of this step are as large as ever, and no sample of small ones."""
        self._timed_as = None

    @contextlib.contextmanager
    def training_on(self, inputs: Any) -> Iterator[None]:
        """Time the training on a micro-batch while κ or α is to be measured."""
        later = self._timed_as is not None and self.measured
        mark = self._mark(later)
        examples = 0 if mark is None else batch_size_of(inputs)
        yield
        if mark is not None:
            self._add((self._timed_as if later else None) or "train", mark, examples)

    def learn(self, batch_size: int) -> None:
        """Take κ and α as measured once enough was timed: one collective each in a run. All ranks must call it."""
        if self._few_ready:
            kappa, overhead, ranks = self.ranks.sum([*self._read_few(batch_size), 1.0])
            self._settle_few(kappa / ranks, overhead / ranks)
            logger.info(
                "In steps on few examples, scoring one takes %.3f of training on one, and %.3f of a step's time does "
                "not shrink.",
                self.kappa,
                self.overhead,
            )
        if self._ready:
            presampling, training, ranks = self.ranks.sum([*self._read(), 1.0])
            self.load(min(max(presampling / training, 0.001), 0.99), training / ranks)
            logger.info("Scoring an example takes %.3f of training on one.", self.kappa)

    # ---- Samples ----

    def _mark(self, later: bool = False) -> Mark:
        """Give a point in time to measure from, for κ or ``later``, for α; None where nothing lacks."""
        unknown = self.overhead is None and self.training is not None if later else not self.measured
        return self._now() if self._wanted and unknown else None

    def _now(self) -> float | torch.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self.device, enable_timing=True)
        event.record()
        return event

    def _add(self, part: Part, start: Mark, examples: int) -> None:
        """Count what passed since ``start`` as the time of ``examples`` examples; nothing where that is None."""
        if start is not None and self.overhead is None and examples:
            self._times[part].append((start, self._now(), examples))

    def _lacks(self, part: Part) -> bool:
        return not self.measured and not self._full(part)

    @property
    def _ready(self) -> bool:
        """Whether enough is timed; the same on all ranks, which time the same batches."""
        return not self.measured and not any(self._lacks(part) for part in KAPPA_PARTS)

    @property
    def _few_ready(self) -> bool:
        return self.overhead is None and all(self._full(part) for part in FEW_PARTS)

    def _full(self, part: Part) -> bool:
        times = self._times[part]
        return len(times) == times.maxlen

    def _read(self) -> list[float]:
        """Give the seconds that presampling one example takes here, and those that training on one takes.

        It waits for the last of the timed batches, once.
        """
        return [self._per_example("wait", "score"), self._per_example("wait", "train")]

    def _read_few(self, batch_size: int) -> list[float]:
        """Give κ and α as they were here in steps on a part of ``batch_size``; it waits as :meth:`_read` does."""
        whole_batches = self._full("wait") and self._full("train")
        training = self._per_example("wait", "train") if whole_batches else self.training or math.nan
        overheads = []
        for start, end, examples in self._counted("few"):
            took, share = _seconds(start, end) / (batch_size * training), examples / batch_size
            overheads.append((took - share) / (1 - share))
        return [self._per_example("pool wait", "pool") / training, self._typical(overheads)]

    def _counted(self, part: Part) -> list:
        return list(self._times[part])[WARM_UP:]

    def _per_example(self, wait: Part, work: Part) -> float:
        waits, works = (
            [_seconds(start, end) / examples for start, end, examples in self._counted(part)] for part in (wait, work)
        )
        # Not the fastest wait, which is none where workers load ahead.
        return statistics.median(waits) + self._typical(works)

    def _typical(self, values: list[float]) -> float:
        return min(values) if self.device.type == "cpu" else statistics.median(values)

    # ---- State ----

    def _settle_few(self, kappa: float, overhead: float) -> None:
        self.load(min(max(kappa, 0.001), 0.99), self.training, min(max(overhead, 0.0), 0.99))
        for spans in self._times.values():
            spans.clear()

    def load(self, kappa: float | None, training: float | None = None, overhead: float | None = None) -> None:
        """Take these as measured; nothing where κ is None. Without the time of training, α is never measured."""
        if kappa is not None:
            self.kappa, self.measured, self.training, self.overhead = kappa, True, training, overhead

    @property
    def state(self) -> ClockState:
        """What a checkpoint holds."""
        return ClockState(self.kappa, self.training, self.overhead) if self.measured else ClockState()

    @state.setter
    def state(self, state: ClockState) -> None:
        self.load(*asdict(state).values())


def _seconds(start: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # both, on a CPU
    end.synchronize()
    return start.elapsed_time(end) / 1000
