"""One optimizer step: what it does and finds, and the watch over what training really computes in it.

Right or off: where the loss was not proved to be its head's, a run is the plain Trainer's, and one warning says why.
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
from hf_importance.objective.model import standing_in
from hf_importance.objective.proof import Evidence
from hf_importance.objective.scorer import Scorer, score_outputs
from hf_importance.reporting.report import Totals
from hf_importance.run.clock import Clock, Times
from hf_importance.run.feed import FeedState
from hf_importance.samplers.sampler import Scored
from hf_importance.transfer import Fetched, to_device

logger = logging.getLogger(__name__)

# Uniform steps in which the loss is held against its head: all of the first, all until it is proved, then one of so
# many. And one of so many steps by importance, or where the logits are few, and it costs next to nothing, all; what is
# found stays on the device until the next whose scores are read.
FIRST, EVERY, EVERY_DRAWN, FEW_LOGITS = 10, 10, 16, 1 << 16
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
        kind: ``"batch"`` (the Trainer's own), ``"visits"`` or ``"pool"``; ``drawn``: whether by importance.
        place: Where reading stands behind it.
        counts: What it trains on and scores, on this rank.
        given: Of visits: their weights; ``represents``: how many uniform draws each stands for; shape ``(m,)``.
        outputs: What its training passes left, of each micro-batch: scores and item count on the device, indices.
        pool: Of a pool: what was scored.
        kept: Of a pool, where the sampler compares: scores and loss weights of what is kept, shape ``(2, n)``; with
            ``heard``, what training passes find of it. ``compared`` gives what came of it in the step before.
        trained: Of a pool: for each of its examples the weight that it is trained with, 0 if it is not.
        sums: Of a pool: the figures over all ranks, see ``Run.commit``.
        micro: What ours each micro-batch holds beside the user's own entries: importance weights and indices.
        rows: Examples in each; ``left_out``: the first so many are not trained on, for the others hold what was kept.
        proves: Whether the loss of this step is held against its head; ``judged``: whether the outcome is read.
        evidence: What came of it: of steps that read none, and of each micro-batch.
        begun: Training steps begun; ``returned``: of each, the loss that was computed in it.
        differs: Of earlier steps, and of each of these, on the device, whether another was descended; shape ``(1,)``.
        doubted: Whether these must be known at the next step: nothing was proved yet.
        fetched: What is on its way to the host; ``sent``: how many of the evidence, and of what differs, are in it.
        late: What differs, where it was not. ``figures``: of the evidence in it, once it was read.
        losses: Losses computed in them.
        descended: How often a backward pass began at one of these, or at what was made of it.
        labels: Where classes have weights, those of uniform draws; ``news``: see :meth:`.ClassWeights.learn`.
        problem: What stands in the way of importance sampling, found in this step; ``blocked``: before a draw.
        times: What it took, where it is timed.
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
    kept: Tensor | None = None
    heard: Fetched | None = None
    compared: Callable[[], list[float]] = list
    trained: Tensor | None = None
    sums: list[float] | None = None
    micro: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    left_out: int = 0
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
    labels: list[Tensor] = field(default_factory=list)
    news: list[Tensor] = field(default_factory=list)
    problem: str | None = None
    blocked: bool = False
    times: Times | None = None

    @property
    def current(self) -> tuple[Tensor | None, Tensor | None]:
        """What ours belongs to the micro-batch in training: weights and indices."""
        return self.micro[self.begun - 1] if 0 < self.begun <= len(self.micro) else (None, None)

    def complaint(self, own_code: str) -> str | None:
        """Say what speaks against importance sampling in how this step went, if anything; ``own_code`` as in Watch."""
        if self.problem is not None:
            return self.problem
        if self.losses == 0:
            return f"the loss is computed past ours ({own_code}): call super()"
        if self.begun != len(self.micro) or self.losses != self.begun - self.left_out:
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
        self.fetched = Fetched([*parts, *self.labels, *[one.figures for one in self.evidence], *self.differs])

    def read(self) -> list[Tensor]:
        """Give what was sent, float64, on the CPU; the one wait for the device, for what it did long ago."""
        assert self.fetched is not None
        found, (evidence, differs) = self.fetched.read(), self.sent
        told = len(found) - evidence - differs
        parts = told - len(self.labels)
        self.figures, self.labels = found[told : told + evidence], found[parts:told]
        late = [] if self.late is None else self.late.read()
        if any(bool(one) for one in (*found[told + evidence :], *late)):
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
        overrides: Whether it overrides a ``compute_loss`` that ours may be called around, see :func:`.can_go_around`.
        barred: Why importance sampling is off for good, or None.
    """

    objective: Objective
    scorer: Scorer
    clock: Clock
    own_code: str
    overrides: bool = False
    barred: str | None = None

    def __post_init__(self) -> None:
        """Nothing is in training."""
        self.step: Step | None = None
        self._few, self.within, self._uniform, self._drawn = True, False, 0, 0
        self._evidence, self._differs = [], []  # of steps that were not waited for

    def bar(self, reason: str, speak: bool = True) -> None:
        """From now on the run is the plain Trainer's, for a reason that this rank says or not. All must come to it."""
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
            due = self._uniform < FIRST or self._uniform % EVERY == 0
            step.proves = due or step.doubted or self.objective.weights.learning
            self._uniform += 1
        else:
            self._drawn += 1
            step.proves = self._few or self._drawn % EVERY_DRAWN == EVERY_DRAWN - 1
            step.judged = step.kind == "visits" or self._drawn % EVERY_DRAWN == 0  # read when its pool is scored
        if step.judged:
            step.evidence, step.differs, self._evidence, self._differs = self._evidence, self._differs, [], []

    def judges(self, step: Step) -> bool:
        """Whether what a finished step found is judged now; what it did not send is left for later."""
        self._evidence += step.evidence[step.sent[0] :]
        self._differs += [] if step.late is not None else step.differs[step.sent[1] :]
        return step.judged

    def leaves_out(self) -> bool:
        """Whether the micro-batch whose training step begins is left out; then this was all of it."""
        step = self.step
        if step is None or step.begun >= step.left_out:
            return False
        step.begun += 1
        step.returned.append(None)
        return True

    @contextlib.contextmanager
    def training_on(self, inputs: Any, attributes: dict[str, Any], around: Callable[..., Any]) -> Iterator[None]:
        """A training step on one micro-batch; ``around`` stands for the trainer's ``compute_loss`` where it must."""
        if self.step is not None:
            self.step.begun += 1
            self.step.returned.append(None)
        self.within = False
        with self.clock.training_on(inputs), standing_in(attributes, "compute_loss", around, self.outside):
            yield
        self.within = False

    def returned(self, loss: Tensor) -> None:
        """See whether what the training step descended is the loss that was computed here."""
        ours = None if self.step is None or not self.step.returned else self.step.returned[-1]
        if ours is not None and self.step is not None:
            other = (loss.detach() != ours) & ~(loss.detach().isnan() & ours.isnan())
            self.step.differs.append(other.float().reshape(1))
            if self.step.doubted and self.step.begun == len(self.step.micro):
                self.step.late = Fetched(self.step.differs[self.step.sent[1] :])

    def loss(
        self, own: Callable[..., Any], model: nn.Module, batch: dict[str, Any], wanted: bool, num_items: Any
    ) -> tuple[Tensor, Any]:
        """Give the loss of a micro-batch in training, and the model's outputs; arguments as ``Objective.loss``."""
        step, objective = self.step, self.objective
        if objective.head is None:
            return own(model, batch, True) if wanted else (own(model, batch, False), None)
        if step is None or self.barred is not None:
            return objective.loss_without_run(own, model, batch, wanted, num_items)
        step.losses += 1
        self.within = self.outside  # what the user's code then asks of ours is the Trainer's
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
            step.evidence.append(found.sent() if objective.weights.learning else found)
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
        if step.kind == "batch" and objective.weights.state.squares:
            step.labels.append(objective.head.labels(batch))
            weights = objective.weights.in_batch(step.labels[-1]) if objective.weights.known else None
        step.outputs.append((scores if weights is None else scores * weights, index, items))
        if step.begun == len(step.micro) == len(step.outputs) + step.left_out:
            parts = [found for found, _, _ in step.outputs]  # the copy runs beside the backward pass
            if step.kind == "pool":
                step.heard = Fetched(parts)
            else:
                step.send(parts + [count[None] for _, _, count in step.outputs])

    def steps_outside(self, step: Step) -> bool:
        """Whether the loss of a step was computed past ours, and ours can be called around the user's from now on."""
        once = step.kind == "batch" and step.begun == len(step.micro) == 1 and step.problem is None
        return once and step.descended < max(step.losses, 1) and self.overrides and not self.outside

    @property
    def outside(self) -> bool:
        """Whether ours is called around the user's ``compute_loss``."""
        return self.objective.weights.state.outside and self.barred is None
