"""What scoring an example costs against training one, κ, measured on the machine that trains, data included.

    κ = (waiting for an example + scoring it) / (waiting for an example + training on it)

Each part is timed for a few batches and its median taken, so that one slow batch does not count. On an accelerator
the times are those between events on its stream: they cost no wait, and hold what the device spent idle for data or
for the host, and nothing of what ran while it was busy. They are read once, when there are enough of them. From then
on κ stays as it is: it goes into the checkpoint, and a resumed run decides the same.

The first steps by importance are timed as well, for what a single batch could not show. Their pools say what scoring
takes, drawing included, in place of the batches before them. And a smaller batch does not train in proportion:
launching kernels, clipping and the like take what they take. That share of a whole batch's time is the overhead α::

    time of n examples = time of b examples * (alpha + (1 - alpha) * n / b)
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from typing import Literal, get_args

import torch

from hf_importance.costs import ASSUMED_KAPPA

Part = Literal["wait", "score", "train", "pool", "few"]
KAPPA_PARTS: tuple[Part, ...] = ("wait", "score", "train")

WARM_UP = 1  # batches of each part that are not counted: allocation, choice of kernels, compilation
SAMPLES = 5  # the most recent batches of each part, which are


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
        self._times: dict[Part, deque] = {part: deque(maxlen=WARM_UP + SAMPLES) for part in get_args(Part)}

    def mark(self, few: bool = False) -> float | torch.Event | None:
        """Give a point in time to measure from, of a step on ``few`` examples or before; None where nothing lacks."""
        unknown = self.overhead is None and self.training is not None if few else not self.measured
        return self._now() if unknown else None

    def _now(self) -> float | torch.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self.device, enable_timing=True)
        event.record()
        return event

    def add(self, part: Part, start: float | torch.Event | None, examples: int) -> None:
        """Count what passed since ``start`` as the time of ``examples`` examples; nothing where that is None."""
        wanted = self.overhead is None if part in ("pool", "few") else not self.measured
        if start is not None and wanted and examples:
            self._times[part].append((start, self._now(), examples))

    def lacks(self, part: Part) -> bool:
        """Say whether more batches of a part are wanted."""
        return not self.measured and len(self._times[part]) < WARM_UP + SAMPLES

    @property
    def ready(self) -> bool:
        """Whether enough is timed; the same on all ranks, which time the same batches."""
        return not self.measured and not any(self.lacks(part) for part in KAPPA_PARTS)

    @property
    def few_ready(self) -> bool:
        """Whether enough steps on few examples are timed."""
        parts: tuple[Part, ...] = ("pool", "few")
        return self.overhead is None and all(len(self._times[part]) == WARM_UP + SAMPLES for part in parts)

    def read(self) -> list[float]:
        """Give the seconds that presampling one example takes here, and those that training on one takes.

        It waits for the last of the timed batches, once.
        """
        medians = {}
        for part in KAPPA_PARTS:
            spans = list(self._times[part])[-SAMPLES:]
            medians[part] = statistics.median(_seconds(*span[:2]) / span[2] for span in spans)
        return [medians["wait"] + medians["score"], medians["wait"] + medians["train"]]

    def read_few(self, batch_size: int) -> list[float]:
        """Give κ and α as they were here in steps on a part of ``batch_size``; it waits as :meth:`read` does."""
        training = self.training or math.nan
        whole = batch_size * training
        pools = list(self._times["pool"])[-SAMPLES:]
        kappa = statistics.median(_seconds(start, end) / examples for start, end, examples in pools) / training
        spans = list(self._times["few"])[-SAMPLES:]
        shares = [examples / batch_size for _, _, examples in spans]
        took = [_seconds(start, end) / whole for start, end, _ in spans]
        overhead = statistics.median((time - share) / (1 - share) for time, share in zip(took, shares, strict=True))
        return [kappa, overhead]

    def settle(self, presampling: float, training: float) -> None:
        """Take these times, over all ranks, as measured."""
        self.load(min(max(presampling / training, 0.001), 0.99), training)

    def settle_few(self, kappa: float, overhead: float) -> None:
        """Take this κ and α, over all ranks, as measured."""
        self.load(min(max(kappa, 0.001), 0.99), self.training, min(max(overhead, 0.0), 0.99))

    def load(self, kappa: float | None, training: float | None = None, overhead: float | None = None) -> None:
        """Take up what a checkpoint holds, None where it was not measured yet."""
        if kappa is not None:
            self.kappa, self.measured, self.training, self.overhead = kappa, True, training, overhead
            for spans in self._times.values():
                spans.clear()


def _seconds(start: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # both, on a CPU
    end.synchronize()
    return start.elapsed_time(end) / 1000
