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

import math
import statistics
import time
from collections import deque
from typing import Literal, get_args

import torch

from hf_importance.costs import ASSUMED_KAPPA

Part = Literal["wait", "score", "train", "pool wait", "pool", "few"]
KAPPA_PARTS: tuple[Part, ...] = ("wait", "score", "train")
FEW_PARTS: tuple[Part, ...] = ("pool wait", "pool", "few")

WARM_UP = 1  # batches of each part that are not counted: allocation, choice of kernels, compilation
SAMPLES = 5  # the most recent batches of each part, which are
FEW_SAMPLES = 9  # the same of steps by importance, which cost nothing to time


class KappaMeter:
    """Times batches until there are enough of them, and then knows κ.

    Args:
        device: Where the model is.

    Attributes:
        kappa: κ, in ``[0.001, 0.99]``: the paper's 1/3 until it is measured.
        measured: Whether it is.
        training: Seconds that training on an example of a whole batch took, data included; None where unknown.
        overhead: α, in ``[0, 0.99]``; None until it is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kappa = ASSUMED_KAPPA
        self.measured = False
        self.training: float | None = None
        self.overhead: float | None = None
        self._times: dict[Part, deque] = {
            part: deque(maxlen=WARM_UP + (FEW_SAMPLES if part in FEW_PARTS else SAMPLES)) for part in get_args(Part)
        }

    def mark(self, later: bool = False) -> float | torch.Event | None:
        """Give a point in time to measure from, for κ or ``later``, for α; None where nothing lacks."""
        unknown = self.overhead is None and self.training is not None if later else not self.measured
        return self._now() if unknown else None

    def _now(self) -> float | torch.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self.device, enable_timing=True)
        event.record()
        return event

    def add(self, part: Part, start: float | torch.Event | None, examples: int) -> None:
        """Count what passed since ``start`` as the time of ``examples`` examples; nothing where that is None."""
        if start is not None and self.overhead is None and examples:
            self._times[part].append((start, self._now(), examples))

    def lacks(self, part: Part) -> bool:
        """Say whether more batches of a part are wanted."""
        return not self.measured and not self._full(part)

    @property
    def ready(self) -> bool:
        """Whether enough is timed; the same on all ranks, which time the same batches."""
        return not self.measured and not any(self.lacks(part) for part in KAPPA_PARTS)

    @property
    def few_ready(self) -> bool:
        """Whether enough steps on few examples are timed."""
        return self.overhead is None and all(self._full(part) for part in FEW_PARTS)

    def _full(self, part: Part) -> bool:
        times = self._times[part]
        return len(times) == times.maxlen

    def read(self) -> list[float]:
        """Give the seconds that presampling one example takes here, and those that training on one takes.

        It waits for the last of the timed batches, once.
        """
        return [self._per_example("wait", "score"), self._per_example("wait", "train")]

    def read_few(self, batch_size: int) -> list[float]:
        """Give κ and α as they were here in steps on a part of ``batch_size``; it waits as :meth:`read` does."""
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

    def settle(self, presampling: float, training: float) -> None:
        """Take these times, over all ranks, as measured."""
        self.load(min(max(presampling / training, 0.001), 0.99), training)

    def settle_few(self, kappa: float, overhead: float) -> None:
        """Take this κ and α, over all ranks, as measured."""
        self.load(min(max(kappa, 0.001), 0.99), self.training, min(max(overhead, 0.0), 0.99))
        for spans in self._times.values():
            spans.clear()

    def load(self, kappa: float | None, training: float | None = None, overhead: float | None = None) -> None:
        """Take up what a checkpoint holds, None where it was not measured yet."""
        if kappa is not None:
            self.kappa, self.measured, self.training, self.overhead = kappa, True, training, overhead


def _seconds(start: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # both, on a CPU
    end.synchronize()
    return start.elapsed_time(end) / 1000
