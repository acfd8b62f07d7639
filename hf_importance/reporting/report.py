"""What importance sampling did since the last logging step, and since the start: the numbers behind the log keys."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import COUNT
from hf_importance.theory.costs import ASSUMED_KAPPA
from hf_importance.theory.sampling import effective_sample_size

logger = logging.getLogger(__name__)

PREFIX = "importance/"
# What everyone looks at; the rest is logged with importance_log="all".
BASIC = ("tau", "active", "active_share", "relative_cost", "examples_saved")
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


def outcome(end: Mapping[str, float], steps: int) -> str:
    """Say in one sentence how a finished run went.

    Args:
        end: Its metrics: what ``train()`` returns as such, or the last entry of its log.
        steps: Optimizer steps of the run.

    >>> counts = {"steps_on": 212, "largest_tau": 2.9, "kappa": 0.2}
    >>> counts |= {"examples_scored": 7168, "examples_trained": 6374, "examples_saved": 6426}
    >>> outcome({PREFIX + name: count for name, count in counts.items()}, 400)
    'Importance sampling: on in 212 of 400 steps, 61% of the compute of uniform steps; largest τ 2.9.'
    """
    own = {name.removeprefix(PREFIX): value for name, value in end.items() if name.startswith(PREFIX)}
    tau = own["largest_tau"]
    if own["steps_on"]:
        return (
            f"Importance sampling: on in {own['steps_on']} of {steps} steps, {relative_compute(end):.0%} of the "
            f"compute of uniform steps; largest τ {tau:.1f}."
        )
    never = f"Importance sampling: never on in {steps} steps, which were the plain Trainer's"
    if own.get("ruled_out"):
        return f"{never}: a warning says what stands in the way."
    if "tau_threshold" in own:
        why = f"the largest τ was {tau:.2f}, and its threshold is {own['tau_threshold']:.2f}"
    elif "lowest_cost" in own:
        why = (
            f"at equal noise a step never cost less than {own['lowest_cost']:.2f} uniform steps (largest τ {tau:.1f})"
        )
    else:
        why = "they were too few to know what it costs"
    return (
        f"{never}: {why}. That is right where most examples still teach; a longer run, or cheaper scoring "
        "(scoring_dtype='bf16'), may change it."
    )


def evaluated(entry: Mapping[str, Any]) -> dict[str, float]:
    """Give what an evaluation found, by name, without what it took; its loss and metrics, in the order logged.

    >>> evaluated({"eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 2.0, "epoch": 1.0})
    {'eval_loss': 0.5, 'eval_accuracy': 0.9}
    """
    taken = ("_runtime", "_per_second", "_time", "_samples")
    return {
        name: value
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(taken) and isinstance(value, int | float)
    }


Count = Annotated[int, COUNT]


@dataclass
class Totals:
    """Counts over all ranks since the start of training; they go into the checkpoint."""

    examples_scored: Count = 0  # by a scoring forward pass; scores from training logits are free and not counted
    examples_trained: Count = 0  # rows of training batches
    examples_distinct: Count = 0  # the same, rows that a batch holds twice counted once
    examples_saved: int = 0  # rows of the Trainer's own batches, what uniform training takes, minus examples_trained
    nonfinite_steps: Count = 0  # optimizer steps left uniform because a score was NaN or infinite


class Report:
    """Collects figures on the host and gives them as one flat dict of floats at a logging step.

    Args:
        sum_over_ranks: Adds up a list of numbers over all ranks; the identity on one.
        everything: Whether all entries go into the log, not those of :data:`BASIC` alone.

    Attributes:
        totals: Counts over all ranks, as of the last :meth:`sync`.
        weight_counts: Weights of what this process drew, by the half octave: see :data:`WEIGHT_EDGES`.
    """

    def __init__(self, sum_over_ranks: Callable[[list[float]], list[float]], everything: bool = False) -> None:
        self._sum_over_ranks = sum_over_ranks
        self._everything = everything
        self.totals = Totals()
        self.weight_counts = torch.zeros(len(WEIGHT_EDGES) - 1, dtype=torch.int64)
        self._unsynced = Totals()
        self._all_scoring_seconds = 0.0
        self._warned = False
        self._restart()

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._scoring_seconds = 0.0
        self._steps = 0
        self._active_steps = 0
        self._max_weight = 1.0
        self._sample_sizes: list[float] = []

    def sample_size(self, size: int) -> None:
        """Count a micro-batch of ``size`` examples that is trained on as the Trainer drew it."""
        self._sample_sizes.append(size)

    def weights(self, weights: Tensor) -> None:
        """Count the importance weights of a micro-batch, shape ``(n,)``."""
        self._sample_sizes.append(effective_sample_size(weights))
        self._max_weight = max(self._max_weight, float(weights.max()))
        halves = (2 * weights.log2()).floor().long() + OCTAVES * 2
        self.weight_counts += halves.clamp_(0, len(self.weight_counts) - 1).bincount(minlength=len(self.weight_counts))

    def step(self, drawn: bool) -> None:
        """Count an optimizer step, trained uniformly or by importance."""
        self._steps += 1
        self._active_steps += drawn

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Time from the fetching of pools to having drawn from them."""
        started = time.perf_counter()
        yield
        self._scoring_seconds += time.perf_counter() - started
        self._all_scoring_seconds += time.perf_counter() - started

    def warn_of_nonfinite(self, step: int, tau: float) -> None:
        """Say once that a step's scores were not finite."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "Step %d: a score is NaN or infinite, so this step trains uniformly and tau stays at %.3f. Such "
                "steps are counted in %snonfinite_steps; this warning comes once. Usual causes: overflow in fp16, "
                "a learning rate that is too high, NaN in the data.",
                step,
                tau,
                PREFIX,
            )

    def add(self, counts: Totals) -> None:
        """Add the counts of a step on this rank."""
        for field in fields(Totals):
            setattr(self._unsynced, field.name, getattr(self._unsynced, field.name) + getattr(counts, field.name))

    def sync(self) -> None:
        """Add what was counted since the last time, on every rank, to :attr:`totals`. All ranks must call it."""
        names = [field.name for field in fields(Totals)]
        increments = self._sum_over_ranks([getattr(self._unsynced, name) for name in names])
        for name, increment in zip(names, increments, strict=True):
            setattr(self.totals, name, getattr(self.totals, name) + int(increment))
        self._unsynced = Totals()

    def drain(self, tau: float, active: bool, switches: int, method: Mapping[str, float]) -> dict[str, float]:
        """Give the log entries since the last call and start anew. All ranks must call it.

        Args:
            tau: Moving average of τ.
            active: Whether importance sampling is on.
            switches: How often it went on or off.
            method: Entries of the method's own.
        """
        self.sync()
        elapsed = time.perf_counter() - self._started
        entries = {
            "tau": tau,
            **method,
            "batch_size_gain": tau**2,
            "active": float(active),
            "active_share": self._active_steps / max(self._steps, 1),
            "switches": switches,
            "max_weight": self._max_weight,
            "effective_sample_size": sum(self._sample_sizes) / max(len(self._sample_sizes), 1),
            "scoring_time_share": self._scoring_seconds / elapsed if elapsed > 0 else 0.0,
            **vars(self.totals),
        }
        self._restart()
        return {PREFIX + name: value for name, value in entries.items() if self._everything or name in BASIC}

    def summary(self, steps_on: int, method: Mapping[str, float]) -> dict[str, float]:
        """Give the metrics of a finished run. All ranks must call it.

        Args:
            steps_on: Optimizer steps drawn by importance since the start.
            method: Entries of the method's own, κ where it was measured, and what the run came to.

        Returns:
            These; ``importance/steps_on``, and ``importance/examples_scored``, ``_trained`` and ``_saved`` over all
            ranks, since the start of training; ``importance/scoring_seconds`` of this process, since this report
            began.
        """
        self.sync()
        totals = self.totals
        entries = {
            "steps_on": steps_on,
            "examples_scored": totals.examples_scored,
            "examples_trained": totals.examples_trained,
            "examples_saved": totals.examples_saved,
            "scoring_seconds": round(self._all_scoring_seconds, 4),
            **method,
        }
        return {PREFIX + name: value for name, value in entries.items()}
