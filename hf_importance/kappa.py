"""What scoring an example costs against training one, κ, measured on the machine that trains, data included.

    κ = (waiting for an example + scoring it) / (waiting for an example + training on it)

Each part is timed for a few batches and its median taken, so that one slow batch does not count. On an accelerator
the times are those between events on its stream: they cost no wait, and hold what the device spent idle for data or
for the host, and nothing of what ran while it was busy. They are read once, when there are enough of them. From then
on κ stays as it is: it goes into the checkpoint, and a resumed run decides the same.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Literal, get_args

import torch

from hf_importance.costs import ASSUMED_KAPPA

Part = Literal["wait", "score", "train"]

WARM_UP = 1  # batches of each part that are not counted: allocation, choice of kernels, compilation
SAMPLES = 5  # the most recent batches of each part, which are


class KappaMeter:
    """Times batches until there are enough of them, and then knows κ.

    Args:
        device: Where the model is.

    Attributes:
        kappa: κ, in ``[0.001, 0.99]``: the paper's 1/3 until it is measured.
        measured: Whether it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kappa = ASSUMED_KAPPA
        self.measured = False
        self._times: dict[Part, deque] = {part: deque(maxlen=WARM_UP + SAMPLES) for part in get_args(Part)}

    def mark(self) -> float | torch.Event | None:
        """Give a point in time to measure from; None once κ is measured."""
        if self.measured:
            return None
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self.device, enable_timing=True)
        event.record()
        return event

    def add(self, part: Part, start: float | torch.Event | None, examples: int) -> None:
        """Count what passed since ``start`` as the time of ``examples`` examples; nothing where that is None."""
        if start is not None and not self.measured and examples:
            self._times[part].append((start, self.mark(), examples))

    def lacks(self, part: Part) -> bool:
        """Say whether more batches of a part are wanted."""
        return not self.measured and len(self._times[part]) < WARM_UP + SAMPLES

    @property
    def ready(self) -> bool:
        """Whether enough is timed; the same on all ranks, which time the same batches."""
        return not self.measured and not any(self.lacks(part) for part in self._times)

    def read(self) -> list[float]:
        """Give the seconds that presampling one example takes here, and those that training on one takes.

        It waits for the last of the timed batches, once.
        """
        medians = {}
        for part, spans in self._times.items():
            medians[part] = statistics.median(_seconds(*span[:2]) / span[2] for span in list(spans)[-SAMPLES:])
        return [medians["wait"] + medians["score"], medians["wait"] + medians["train"]]

    def settle(self, presampling: float, training: float) -> None:
        """Take these times, over all ranks, as measured."""
        self.load(min(max(presampling / training, 0.001), 0.99))

    def load(self, kappa: float | None) -> None:
        """Take up what a checkpoint holds, None where it was not measured yet."""
        if kappa is not None:
            self.kappa, self.measured = kappa, True
            for spans in self._times.values():
                spans.clear()


def _seconds(start: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # both, on a CPU
    end.synchronize()
    return start.elapsed_time(end) / 1000
