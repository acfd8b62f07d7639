"""What decides which examples an optimizer step trains on. A sampler decides; the run does the rest.

::

    visits? ── yes ─► these examples, by index ────────────────► weighted loss
      │ no                                                        ▲
    own batch ── pool? ── yes ─► + reserve ─► score ─► keep ──────┘
                   │ no
                   └─► the Trainer's own batch as it came

A method is a subclass of :class:`Sampler` in one file: it overrides ``visits``, or ``pool`` and ``keep``, and where it
has something to learn ``measure`` and ``learn``. Loading, scoring, weighting, collectives, logging and checkpoints are
the run's. ``hf_importance.testing.SamplerLaws`` holds a sampler to the laws that stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_importance.checkpoint.schema import from_state


@dataclass(frozen=True)
class Visits:
    """Examples of the training set for the next micro-batches, in order, over all ranks.

    Attributes:
        index: Which examples; integer, shape ``(n,)``.
        weights: What the loss of each is multiplied by, of mean 1; shape ``(n,)``.
        micro_batches: On each rank; at most ``run.micro_batches_left``, so that epochs stay the Trainer's.
        represents: How many uniformly drawn examples each stands for, of mean 1, where not its weight (a biased
            method); shape ``(n,)``.
        batch_size: Examples of a micro-batch on each rank, on average, at least 1; None: evenly split. Sizes differ by
            one at most.
        uniform: Whether they are drawn uniformly, so that the steps count as off.
    """

    index: Tensor
    weights: Tensor
    micro_batches: int
    represents: Tensor | None = None
    batch_size: float | None = None
    uniform: bool = False


@dataclass(frozen=True)
class Pool:
    """Complete each micro-batch to a pool, score it, and keep a part.

    Attributes:
        size: Examples of a pool, ``B``; the batch size at least.
        kept: Of a whole batch, about how many are trained on, ``n``, in ``[1, b]``.
        varies: Whether ``size`` changes from step to step; the reserve then comes in quarters of a batch.
    """

    size: int
    kept: int
    varies: bool = False


@dataclass(frozen=True)
class Scored:
    """Examples with their scores, on the CPU: a pool, or what the training passes of one step found.

    Attributes:
        scores: Non-negative, float64, shape ``(B,)``.
        index: Which examples of the training set, int64, shape ``(B,)``, where the sampler remembers; else None.
        own: The first of them are the Trainer's own batch, so many.
        kept: In ``keep``: how many to keep in place of them, rounded, at least 1.
        weights: How many uniformly drawn examples each stands for, of mean 1; float64, shape ``(B,)``.
        parts: Sizes of the pools, or of the micro-batches, that it is made of.
        kind: In ``measure``: ``"batch"`` (uniform steps), ``"pool"`` or ``"visits"``.
        generator: In ``keep``: source of randomness, the same if asked again.
    """

    scores: Tensor
    index: Tensor | None
    own: int
    kept: int
    weights: Tensor
    parts: tuple[int, ...] = ()
    kind: Literal["batch", "pool", "visits"] = "pool"
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Facts:
    """What a sampler may know of the run, to be read only; the same on every rank but for ``rank``.

    Attributes:
        examples: Of the training set; None for a stream.
        batch_size: Of a micro-batch on each rank, ``b``.
        accumulation: Micro-batches of an optimizer step.
        micro_batches: Of an epoch, on each rank; 0 for a stream.
        updates: Optimizer steps of an epoch; 0 for a stream.
        fewest: Examples that a micro-batch should keep at least (BatchNorm needs some to normalise by).
        rank: Index of this process. Nothing that decides may depend on it.
        ranks: Number of processes.
        seed: What all draws are keyed by.
        table: Last score of each example, where the sampler remembers, else None: ``table.scores`` is NaN where an
            example was never seen; float32, shape ``(examples,)``.
        clock: What scoring costs: ``clock.kappa``, ``clock.overhead``, ``clock.measured``.
        step: Gives the optimizer steps done.
        steps: Gives those of the whole run.
        place: Gives the optimizer steps of this epoch before this one.
        visiting: Gives whether the steps before this point were visits.
        drawn: Gives whether the last step was drawn by importance.
        draws: Gives how many visits were begun.
        tau: Gives the moving average of τ, ``>= 1``.
        score_all: Scores every example anew, in a forward pass over the training set, into the table. All ranks must
            call it; it costs what it costs, and counts as scoring.
        generator: Gives a generator for a key of non-negative integers: keyed by the seed too, so that none is saved.
    """

    examples: int | None
    batch_size: int
    accumulation: int
    micro_batches: int
    updates: int
    fewest: int
    rank: int
    ranks: int
    seed: int
    table: Any
    clock: Any
    step: Callable[[], int]
    steps: Callable[[], int]
    place: Callable[[], int]
    visiting: Callable[[], bool]
    drawn: Callable[[], bool]
    draws: Callable[[], int]
    tau: Callable[[], float]
    score_all: Callable[[], None]
    generator: Callable[..., torch.Generator]

    @property
    def micro_batches_left(self) -> int:
        """Micro-batches until the end of the epoch, on each rank."""
        return max(self.micro_batches - self.place() * self.accumulation, 1)

    @property
    def progress(self) -> float:
        """Share of the optimizer steps that are done, in ``[0, 1]``."""
        return min(self.step() / self.steps(), 1.0)


@dataclass
class Nothing:
    """The state of a sampler that has none."""


class Sampler:
    """A sampling method. All that it decides follows from figures that every rank has; see the module.

    Attributes:
        score: What an example is scored by: ``"upper_bound"``, ``"loss"``, or a function ``(outputs, labels)`` giving
            one non-negative score an example, shape ``(b,)``.
        remembers: Whether batches know their examples, and ``run.table`` has the last score of each.
        momentum: Share of the old average of τ that a step keeps, in ``[0, 1)``.
        State: A dataclass of what is saved and changes in the course of a run: numbers, flags, lists of numbers. A
            fresh one is made when a run begins.
        state: The one of this run.
        run: What is known of this run.
    """

    score: str | Callable[[Any, Tensor], Tensor] = "upper_bound"
    remembers: bool = False
    momentum: float = 0.9
    State: ClassVar[type] = Nothing
    state: Any
    run: Facts

    @property
    def needs_memory(self) -> bool:
        """Whether it cannot do without the table; a stream has none."""
        return self.remembers

    @property
    def timed(self) -> bool:
        """Whether it goes by what scoring costs, so that the clock has to measure it."""
        return False

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins; settings stay."""
        self.run, self.state = run, self.State()

    # ---- Decide, from what all ranks share ----

    def visits(self) -> Visits | None:
        """Name the examples of the next steps; None: they start from the Trainer's own batch.

        Asked between two steps, where visits have ended, and while none run ten times an epoch. Only samplers that
        remember are asked. Within an epoch that has been visited, None means uniform visits to its end, since nobody
        has read its loader.
        """
        return None

    def pool(self) -> Pool | None:
        """Say how many examples this step scores; None: it trains on the Trainer's own batch as it is.

        Asked in every step that is no visit. It changes nothing: asked twice, it says the same.
        """
        return None

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Choose the rows of a scored pool that are trained on, and their weights, of mean 1.

        It changes nothing: asked twice, it gives the same.

        Returns:
            Rows of the pool, int64, shape ``(n,)`` with ``n >= 1``, and weights, shape ``(n,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for pools, so it must say what to keep of one.")

    def weigh(self, weights: Tensor) -> Tensor:
        """Bias the weights of what is kept in one optimizer step, over all its micro-batches on this rank.

        A step is the same however it is cut into micro-batches, so what depends on more than one weight belongs here.

        Args:
            weights: What :meth:`keep` gave, float64, shape ``(n,)``.

        Returns:
            What they are trained with, shape ``(n,)``.
        """
        return weights

    # ---- Learn ----

    def measure(self, seen: Scored) -> Sequence[float]:
        """Give this rank's figures of a step, to be added up over all; always as many. It changes nothing."""
        return ()

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Take in a step: the only place, beside ``visits``, where what decides may change.

        Args:
            tau: Of this step alone; ``run.tau()`` is the average, this step in it.
            sums: What :meth:`measure` gave, over all ranks.
        """

    # ---- Say ----

    @property
    def active(self) -> bool:
        """Whether steps are drawn by importance now; a change of it is a switch, and is logged."""
        return self.run.drawn()

    @property
    def source(self) -> str:
        """What they are drawn by while it is on: a change of it is a switch too."""
        return "on"

    @property
    def gain(self) -> float:
        """How many times as large a uniform batch would be with the noise of a step of its; 1 where nobody knows."""
        return 1.0

    def status(self) -> str:
        """Say in a few characters what τ is compared with, for the progress bar."""
        return ""

    def log_entries(self) -> dict[str, float]:
        """Give entries for the log, by their name without the prefix."""
        return {}

    def outcome(self) -> dict[str, float]:
        """Give entries for the metrics of a finished run, by their name without the prefix."""
        return {}

    def sentence(self) -> str | None:
        """Say how a finished run went; None: how many of its steps were drawn, and what that saved."""
        return None

    # ---- Save ----

    def state_dict(self) -> dict[str, Any]:
        """Give the state, as JSON can hold it."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            ValueError: It is none.
        """
        self.state = from_state(self.State, state, f"the state of {type(self).__name__}")
