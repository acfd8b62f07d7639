"""What importance sampling did since the last logging step, and since the start: the numbers behind the log keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hf_importance.costs import ASSUMED_KAPPA
from hf_importance.sampling import effective_sample_size
from hf_importance.switching import Switch

PREFIX = "importance/"
OCTAVES = 7  # on each side of a weight of 1, of the histogram of weights; what lies outside counts into its last bars
WEIGHT_EDGES = [2.0 ** (half / 2) for half in range(-2 * OCTAVES, 2 * OCTAVES + 1)]


def relative_compute(entry: Mapping[str, float]) -> float:
    """Compute of a run so far over that of uniform training for as many steps.

    An example scored counts as κ of one trained on, as the entry says; as a third where it does not: a backward pass
    costs about two forward passes.

    Args:
        entry: What a log entry, or ``train()``'s metrics, say of the counts.

    >>> counts = {"scored": 30, "trained": 10, "saved": 0}
    >>> entry = {f"importance/examples_{name}": count for name, count in counts.items()}
    >>> relative_compute(entry), relative_compute({**entry, "importance/kappa": 0.1})
    (2.0, 1.3)
    """
    scored, trained, saved = (entry[f"{PREFIX}examples_{name}"] for name in ("scored", "trained", "saved"))
    return (trained + entry.get(f"{PREFIX}kappa", ASSUMED_KAPPA) * scored) / (trained + saved)


@dataclass
class Totals:
    """Counts over all ranks since the start of training; they go into the checkpoint."""

    examples_scored: int = 0  # by a scoring forward pass; scores from training logits are free and not counted
    examples_trained: int = 0  # rows of training batches
    examples_distinct: int = 0  # the same, rows that a batch holds twice counted once
    examples_saved: int = 0  # rows of the Trainer's own batches, what uniform training takes, minus examples_trained
    nonfinite_steps: int = 0  # optimizer steps left uniform because a score was NaN or infinite


class Report:
    """Collects per-step figures on the host and gives them as one flat dict of floats at a logging step.

    Args:
        sum_over_ranks: Adds up a list of numbers over all ranks; the identity on one.
    """

    def __init__(self, sum_over_ranks: Callable[[list[float]], list[float]]) -> None:
        self._sum_over_ranks = sum_over_ranks
        self.totals = Totals()
        self._unsynced = Totals()
        # Weights of what this process drew, by the half octave: see WEIGHT_EDGES.
        self.weight_counts = torch.zeros(len(WEIGHT_EDGES) - 1, dtype=torch.int64)
        self.steps_on = 0  # optimizer steps drawn by importance since the start; the same on every rank
        self._all_scoring_seconds = 0.0
        self.mark()
        self._restart()

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._scoring_seconds = 0.0
        self._steps = 0
        self._active_steps = 0
        self._max_weight = 1.0
        self._sample_sizes: list[float] = []

    def uniform_batch(self, size: int) -> None:
        """Count a micro-batch of ``size`` examples that is trained on as the Trainer drew it."""
        self._unsynced.examples_trained += size
        self._unsynced.examples_distinct += size
        self._sample_sizes.append(size)

    def weighted_batch(self, weights: Tensor, distinct: int, own: int) -> None:
        """Count a resampled micro-batch, with its importance weights and how many of its rows are distinct.

        Args:
            weights: One a row, shape ``(n,)``.
            distinct: How many of the rows are distinct.
            own: Rows of the Trainer's own batch in its place.
        """
        self._unsynced.examples_trained += len(weights)
        self._unsynced.examples_saved += own - len(weights)
        self._unsynced.examples_distinct += distinct
        self._sample_sizes.append(effective_sample_size(weights))
        self._max_weight = max(self._max_weight, float(weights.max()))
        halves = (2 * weights.log2()).floor().long() + OCTAVES * 2
        self.weight_counts += halves.clamp_(0, len(self.weight_counts) - 1).bincount(minlength=len(self.weight_counts))

    def step(self, active: bool) -> None:
        """Count an optimizer step, trained uniformly or by importance."""
        self._steps += 1
        self._active_steps += active
        self.steps_on += active

    def scored(self, examples: int, seconds: float) -> None:
        """Count a pool that was scored, and the time from fetching it to having drawn from it."""
        self._unsynced.examples_scored += examples
        self._scoring_seconds += seconds
        self._all_scoring_seconds += seconds

    def nonfinite(self) -> None:
        """Count an optimizer step whose scores were not all finite on this rank."""
        self._unsynced.nonfinite_steps += 1

    def sync(self) -> None:
        """Add what was counted since the last time, on every rank, to :attr:`totals`. All ranks must call it."""
        self.totals = self._with_all_ranks(self.totals, self._unsynced)
        self._unsynced = Totals()

    def mark(self) -> None:
        """Remember the counts as they stand now."""
        self._marked = self.totals, replace(self._unsynced)

    def marked(self) -> Totals:
        """Give the counts over all ranks as they stood at the last :meth:`mark`. All ranks must call it."""
        return self._with_all_ranks(*self._marked)

    def _with_all_ranks(self, totals: Totals, unsynced: Totals) -> Totals:
        names = [field.name for field in fields(Totals)]
        increments = self._sum_over_ranks([getattr(unsynced, name) for name in names])
        return Totals(**{n: getattr(totals, n) + int(i) for n, i in zip(names, increments, strict=True)})

    def drain(self, switch: Switch, method: dict[str, float]) -> dict[str, float]:
        """Give the log entries since the last call and start anew. All ranks must call it.

        Args:
            switch: Says what is on.
            method: Entries of the method's own.
        """
        self.sync()
        elapsed = time.perf_counter() - self._started
        entries = {
            "tau": switch.tau,
            **method,
            "batch_size_gain": switch.tau**2,
            "active": float(switch.active),
            "active_share": self._active_steps / max(self._steps, 1),
            "switches": switch.switches,
            "max_weight": self._max_weight,
            "effective_sample_size": sum(self._sample_sizes) / max(len(self._sample_sizes), 1),
            "scoring_time_share": self._scoring_seconds / elapsed if elapsed > 0 else 0.0,
            **vars(self.totals),
        }
        self._restart()
        return {PREFIX + name: value for name, value in entries.items()}

    def summary(self, kappa: float | None = None) -> dict[str, float]:
        """Give the metrics of a finished run. All ranks must call it.

        Args:
            kappa: κ, where it was measured.

        Returns:
            ``importance/kappa``, if any; ``importance/steps_on``, and ``importance/examples_scored``, ``_trained`` and
            ``_saved`` over all ranks, since the start of training; ``importance/scoring_seconds`` of this process,
            since this report began.
        """
        self.sync()
        totals = self.totals
        entries = {
            "steps_on": self.steps_on,
            "examples_scored": totals.examples_scored,
            "examples_trained": totals.examples_trained,
            "examples_saved": totals.examples_saved,
            "scoring_seconds": round(self._all_scoring_seconds, 4),
            **({} if kappa is None else {"kappa": kappa}),
        }
        return {PREFIX + name: value for name, value in entries.items()}
