"""One optimizer step: what it does and finds, and the watch over what training really computes in it.

Right or off: importance sampling is on only where the loss was proved to be what its head says. Whatever a user's
model, loss, loader or batch is, training goes on: as the plain Trainer does, with one warning that says what stands in
the way.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from hf_importance.objective.loss import Objective
from hf_importance.objective.proof import Evidence, describe, verdict
from hf_importance.objective.scorer import Scorer, score_outputs
from hf_importance.reporting.report import Totals
from hf_importance.run.clock import Clock
from hf_importance.run.feed import FeedState
from hf_importance.samplers.sampler import Scored
from hf_importance.transfer import Fetched, to_device

logger = logging.getLogger(__name__)

# Uniform steps in which the loss is held against its head: all of the first, then one of so many; where the logits
# are few, and it costs next to nothing, all. And one of so many steps by importance; where the logits are few what is
# found in the others waits on the device for the one behind that.
FIRST, EVERY, EVERY_DRAWN = 10, 10, 16
FEW_LOGITS = 1 << 16
OFF = "Importance sampling is off for this run, which goes on as the plain Trainer's: %s."
WHAT_TO_DO = (
    "Say what the loss of each example is, with compute_example_losses=..., or pass importance_sampling=False to be "
    "rid of this warning"
)


@dataclass
class Step:
    """A step in progress, or done and not committed yet.

    Attributes:
        number: Optimizer steps before it.
        kind: ``"batch"`` (the Trainer's own), ``"visits"`` or ``"pool"``.
        drawn: Whether it is drawn by importance.
        place: Where reading stands behind it.
        counts: What it trains on and scores, on this rank.
        given: Of visits: their weights; ``represents``: how many uniform draws each stands for; shape ``(m,)``.
        outputs: What its training passes left, of each micro-batch: scores and item count on the device, indices.
        pool: Of a pool: what was scored.
        kept: Of a pool: scores of what is kept, and what its loss is multiplied by, where the sampler compares them
            with what training passes find, which is ``heard``; ``compared`` is what came of it in the step before.
        trained: Of a pool: for each of its examples the weight that it is trained with, 0 if it is not.
        sums: Of a pool: the figures over all ranks, see ``Run.commit``.
        micro: What ours each micro-batch holds beside the user's own entries: importance weights and indices.
        proves: Whether the loss of this step is held against its head; ``judged``: whether the outcome is read.
        evidence: What came of it: of steps that read none, and of each micro-batch.
        rows: Examples in each of these.
        begun: Training steps begun; ``returned``: of each, the loss that was computed in it.
        differs: Of steps before this one, and of each of these, on the device, whether another was descended.
        doubted: Whether these must be known at the next step: nothing was proved yet.
        fetched: What is on its way to the host.
        sent: How many of the evidence, and of what differs, are in it.
        late: What differs, where it was not. ``figures``: of the evidence in it, once it was read.
        losses: Losses computed in them.
        descended: How often a backward pass began at one of these, or at what was made of it.
        problem: What stands in the way of importance sampling, found in this step.
        blocked: Whether a rank found something in its way before anything was drawn; all ranks know.
    """

    number: int
    kind: str
    drawn: bool = False
    place: FeedState | None = None
    counts: Totals = field(default_factory=Totals)
    given: Tensor | None = None
    represents: Tensor | None = None
    outputs: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    pool: Scored | None = None
    kept: tuple[Tensor, Tensor] | None = None
    heard: Fetched | None = None
    compared: list[float] = field(default_factory=list)
    trained: Tensor | None = None
    sums: list[float] | None = None
    micro: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    proves: bool = False
    judged: bool = True
    evidence: list[Evidence] = field(default_factory=list)
    begun: int = 0
    returned: list[Tensor | None] = field(default_factory=list)
    differs: list[Tensor] = field(default_factory=list)
    doubted: bool = False
    fetched: Fetched | None = None
    sent: tuple[int, int] = (0, 0)
    late: Fetched | None = None
    figures: list[Tensor] = field(default_factory=list)
    losses: int = 0
    descended: int = 0
    problem: str | None = None
    blocked: bool = False

    @property
    def current(self) -> tuple[Tensor | None, Tensor | None]:
        """What ours belongs to the micro-batch in training: weights and indices."""
        return self.micro[self.begun - 1] if 0 < self.begun <= len(self.micro) else (None, None)

    def complaint(self, own_code: str) -> str | None:
        """Say what speaks against importance sampling in how this step went, if anything.

        Args:
            own_code: Which hooks of the Trainer the user's code overrides, for the sentence.
        """
        if self.problem is not None:
            return self.problem
        if self.losses == 0:
            return f"the loss is computed past ours ({own_code}): call super()"
        if self.begun != len(self.micro) or self.losses != self.begun:
            return (
                f"a step has {len(self.micro)} micro-batches, and {self.begun} training steps with {self.losses} "
                f"losses were made of them ({own_code})"
            )
        if self.descended < self.losses:
            return f"the loss that is descended is another than compute_loss computed ({own_code}): return that one"
        return None

    def descends(self, gradient: Tensor) -> None:
        """Note that a backward pass came to a loss."""
        self.descended += 1

    def send(self, parts: list[Tensor]) -> None:
        """Begin to copy these to the host, and all that is to be judged: vectors, at least one."""
        self.sent = len(self.evidence), len(self.differs)
        self.fetched = Fetched([*parts, *[one.figures for one in self.evidence], *self.differs])

    def read(self) -> list[Tensor]:
        """Give what was sent, float64, on the CPU; the one wait for the device, for what it did long ago."""
        assert self.fetched is not None
        found, (evidence, differs) = self.fetched.read(), self.sent
        parts = len(found) - evidence - differs
        self.figures = found[parts : parts + evidence]
        late = [] if self.late is None else self.late.read()
        if any(bool(one) for one in (*found[parts + evidence :], *late)):
            self.problem = "the loss that is descended is another than compute_loss computed: something is added to it"
        return found[:parts]


@dataclass
class Watch:
    """Sees the training passes of a run.

    Attributes:
        objective: Computes the loss.
        scorer: Scores their outputs.
        clock: Times them.
        own_code: Which hooks of the Trainer the user's code overrides, for sentences.
        barred: Why importance sampling is off for good, or None.
    """

    objective: Objective
    scorer: Scorer
    clock: Clock
    own_code: str
    barred: str | None = None

    def __post_init__(self) -> None:
        """Nothing is in training."""
        self.step: Step | None = None
        self._few = True
        self._uniform = self._drawn = 0
        self._evidence: list[Evidence] = []  # of steps that were not waited for
        self._differs: list[Tensor] = []

    def bar(self, reason: str, speak: bool = True) -> None:
        """From now on the run is the plain Trainer's. All ranks must come to it.

        Args:
            reason: What stands in the way, and what to do; a sentence without its end.
            speak: Whether this rank says so.
        """
        if self.barred is None and speak:
            logger.warning(OFF, reason.removesuffix("."))
        self.barred = self.barred or reason
        # What importance_sampling=False does to a loss goes on: its scale is repaired, or it is the user's function's.
        head, scale = self.objective.head, self.objective.scale
        if head is None or scale is None or not (head.computes or scale.over_step is False):
            self.objective.leave_to_trainer()

    def begin(self, step: Step) -> None:
        """A step begins: see whether its loss is to be proved, and whether what is known of others is read."""
        self.step = step
        if step.kind == "batch":
            step.proves = self._few or self._uniform < FIRST or self._uniform % EVERY == 0
            self._uniform += 1
        else:
            self._drawn += 1
            step.proves = self._few or self._drawn % EVERY_DRAWN == 0
            step.judged = step.kind == "visits" or self._drawn % EVERY_DRAWN == 1
        if step.judged:
            step.evidence, self._evidence = self._evidence, []
            step.differs, self._differs = self._differs, []

    def judges(self, step: Step) -> bool:
        """Whether what a finished step found is judged now; what it did not send is left for later."""
        evidence, differs = step.sent
        self._evidence += step.evidence[evidence:]
        self._differs += [] if step.late is not None else step.differs[differs:]
        return step.judged

    @contextlib.contextmanager
    def training_on(self, inputs: Any) -> Iterator[None]:
        """A training step on one micro-batch."""
        if self.step is not None:
            self.step.begun += 1
            self.step.returned.append(None)
        with self.clock.training_on(inputs):
            yield

    def returned(self, loss: Tensor) -> None:
        """See whether what the training step descended is the loss that was computed here."""
        ours = None if self.step is None or not self.step.returned else self.step.returned[-1]
        if ours is not None and self.step is not None:
            other = (loss.detach() != ours) & ~(loss.detach().isnan() & ours.isnan())
            self.step.differs.append(other.float().reshape(1))
            if self.step.doubted and self.step.begun == len(self.step.micro):
                self.step.late = Fetched(self.step.differs[self.step.sent[1] :])

    def loss(
        self,
        own: Callable[[nn.Module, dict[str, Any], bool], Any],
        model: nn.Module,
        batch: dict[str, Any],
        wanted: bool,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """Give the loss of a micro-batch in training, and the model's outputs; arguments as ``Objective.loss``."""
        step, objective = self.step, self.objective
        if objective.head is None or step is None or self.barred is not None:
            if objective.head is None:
                found = own(model, batch, wanted)
                return found if wanted else (found, None)
            return objective.loss_without_run(own, model, batch, wanted, num_items)
        step.losses += 1
        weights, index = step.current
        rows, whole = objective.rows_in(batch), step.rows[step.begun - 1 : step.begun]
        if whole and rows != whole[0]:
            step.problem = step.problem or f"the loss is computed of {rows} examples of {whole[0]} ({self.own_code})"
            weights = None
        if weights is not None:
            weights = to_device(weights, next(v.device for v in batch.values() if isinstance(v, Tensor)))
        listens = step.kind != "pool" or step.kept is not None
        loss, outputs, found = objective.loss(own, model, batch, weights, wanted or listens, num_items, step.proves)
        if isinstance(found, str):
            step.problem = step.problem or f"{found} ({self.own_code}). {WHAT_TO_DO}"
        elif found is not None:
            step.evidence.append(found)
        if listens and step.problem is None:
            self._hear(step, outputs, batch, weights, index)
        if step.returned:
            step.returned[-1] = loss.detach()
        if loss.requires_grad:
            loss.register_hook(step.descends)
        return loss, outputs

    def _hear(self, step: Step, outputs: Any, batch: dict[str, Any], weights: Tensor | None, index: Any) -> None:
        """Keep what the logits of a training pass say, and with the last of a step send it to the host."""
        objective = self.objective
        assert objective.head is not None and objective.scale is not None
        try:
            scores = score_outputs(outputs, batch, objective.head, self.scorer.score)
            items = objective.scale.items(batch)
            few = sum(part.numel() for part in objective.head.logits(outputs)) <= FEW_LOGITS
            self._few = few and objective.head.cheap and not objective.fused
        except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
            if should_reduce_batch_size(error):  # out of memory, which auto_find_batch_size waits for
                raise
            step.problem = f"its examples cannot be scored ({type(error).__name__}: {error}). {WHAT_TO_DO}"
            return
        step.outputs.append((scores if weights is None else scores * weights, index, items))
        if step.begun == len(step.micro) == len(step.outputs):
            parts = [found for found, _, _ in step.outputs]  # the copy runs beside the backward pass
            if step.kind == "pool":
                step.heard = Fetched(parts)
            else:
                step.send(parts + [count[None] for _, _, count in step.outputs])

    def judge(self, step: Step) -> tuple[float, float]:
        """Say whether the evidence that was read speaks against the head, and whether for it; 0 or 1 each."""
        judged = [
            (figures, verdict(figures, one.tolerance))
            for figures, one in zip(step.figures, step.evidence, strict=False)
        ]
        against = next((figures for figures, (bad, _) in judged if bad), None)
        if against is not None:
            step.problem = f"the loss is another than the model's head says ({describe(against)}). {WHAT_TO_DO}"
        return float(against is not None), float(any(good for _, (_, good) in judged))
