"""The loss of a micro-batch: weighted where the batch says so, of one scale whatever model and accumulation.

It knows a model and how its loss splits by example; it knows no run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from hf_importance.batches.entries import WEIGHTS, batch_size_of
from hf_importance.heads.class_weights import ClassWeights, WeightState
from hf_importance.heads.head import Head, with_loss
from hf_importance.heads.user_loss import FunctionHead
from hf_importance.objective.batch_norm import FEWEST_FOR_BATCH_NORM, batch_norm_layers
from hf_importance.objective.fused import FusedLoss
from hf_importance.objective.proof import Evidence, has_classes
from hf_importance.objective.prove import evidence_apart, evidence_of, without_graph
from hf_importance.objective.scale import LossScale

logger = logging.getLogger(__name__)

_BATCH_NORM_MEANING = {
    "frozen": "the running statistics stay as they are, in every step",
    "untouched": "left alone, so that in importance steps the running statistics follow the hard examples",
}


class Objective:
    """The loss that is trained on.

    Args:
        model: The unwrapped model.
        head: How its loss splits by example; None where nobody knows, and the loss is left to the Trainer.
        batch_norm: ``"untouched"`` or ``"frozen"``.
        shifts_labels: Whether ``Trainer`` leaves out the first label of each row when it counts the step's items.
        takes_items: Whether the loss is given the step's item count.
        ranks: Number of processes.
        averaged: Number of those that an item count of ours spans.
        multiplied: Number by which ``Trainer`` multiplies a loss that is given the count.
        repairs: Whether a mean over the micro-batch may be brought to one over the step; not where the user's own
            code computes or scales the loss.
        sharded: Whether parameters are whole only inside the wrapped model's forward.
        fused: Gives the loss of a trainer that is known to compute it without making logits, else None.
        accumulates: Whether an optimizer step has several micro-batches.

    Attributes:
        weights: Class weights of the loss, as far as they are known.
        step_items: Items of the optimizer step in progress, over all ranks; None where each micro-batch is a step of
            its own.
        scaled: Whether the last loss was brought to a mean over the step.
        without_labels: Whether the model was called without its labels for it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head | None,
        batch_norm: str,
        shifts_labels: bool,
        takes_items: bool,
        ranks: int,
        averaged: int,
        multiplied: int,
        repairs: bool,
        sharded: bool,
        fused: FusedLoss | None = None,
        accumulates: bool = True,
    ) -> None:
        self.head = head
        self.scale = None if head is None else LossScale(head, shifts_labels)
        self.step_items: Tensor | float | None = None
        self.scaled = self.without_labels = False
        self.ranks, self.averaged, self.repairs = ranks, averaged, repairs
        self.takes_items, self._multiplied = takes_items, multiplied
        self.sharded, self.fused, self.accumulates = sharded, fused, accumulates
        self.weights = ClassWeights()
        self._layers = batch_norm_layers(model)
        self._frozen = batch_norm == "frozen"
        if self._layers:
            meaning, kind = _BATCH_NORM_MEANING[batch_norm], type(model).__name__
            logger.info("%s has %d BatchNorm layers: batch_norm=%r, %s.", kind, len(self._layers), batch_norm, meaning)

    @property
    def fewest(self) -> int:
        """Examples that a batch keeps at least: BatchNorm must not normalise by a handful of hard ones."""
        return FEWEST_FOR_BATCH_NORM if self._layers and not self._frozen else 1

    # ---- Items ----

    def count(self, batches: list) -> None:
        """Count the items of a step on this rank, where its loss will be brought to their mean.

        Raises:
            ValueError: Labels are missing.
        """
        self.step_items = None
        if self.head is None or self.scale is None or not batches:
            return
        self.head.labels(batches[0])
        # On several ranks always: they may learn the scale at different steps, and must all take part in the sum.
        several = len(batches) > 1 and (not self.scale.over_step or WEIGHTS in batches[0])
        if self.ranks > 1 or several:
            self.step_items = torch.stack([self.scale.items(batch) for batch in batches]).sum()

    def rows_in(self, batch: Any) -> int:
        """Give the examples in a batch: as many as it has labels, for its first entry may be anything."""
        names = () if self.head is None else self.head.label_names
        labels = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
        return batch_size_of(batch) if labels is None or labels.dim() == 0 else len(labels)

    def count_where_repaired(self, batches: list) -> None:
        """Without a run: count the items of a step whose scale the Trainer leaves wrong, and of no other."""
        self.step_items = None
        try:
            if self.repairs or (self.head is not None and self.head.computes):
                self.count(batches)
        except (ValueError, TypeError, AttributeError, KeyError):  # no labels, or none as the head knows them
            self.leave_to_trainer()

    # ---- Loss ----

    def applies(self, training: bool, batch: Any) -> bool:
        """Whether, without a run, the loss of a batch is anything but the Trainer's own business."""
        self.scaled = False
        if self.head is None:
            return False
        return self.head.computes or WEIGHTS in batch or (training and self.step_items is not None)

    def loss_without_run(
        self, own: Callable[..., Any], model: nn.Module, batch: dict[str, Any], wanted: bool, num_items: Any
    ) -> tuple[Tensor, Any]:
        """Give the loss of a micro-batch and the outputs, as the Trainer does where the head knows no better."""
        loss, outputs, problem = self.loss(own, model, batch, None, wanted, num_items)
        if isinstance(problem, str):
            self.leave_to_trainer()
        return loss, outputs

    def hold_batch_norm(self, training: bool) -> None:
        """Let BatchNorm normalise in this forward pass as the policy says."""
        if training and self._frozen:
            for layer in self._layers:
                layer.eval()  # until the next training_step calls model.train()

    def loss(
        self,
        own: Callable[[nn.Module, dict[str, Any], bool], Any],
        model: nn.Module,
        batch: dict[str, Any],
        weights: Tensor | None,
        wanted: bool,
        num_items: Tensor | int | None,
        prove: bool = False,
    ) -> tuple[Tensor, Any, Evidence | str | None]:
        """Give the loss of a micro-batch, the model's outputs, and evidence that the head is right, or what is wrong.

        Args:
            own: The Trainer's ``compute_loss(model, inputs, return_outputs)``.
            model: What is called.
            batch: The micro-batch; a weight that it brings for each example counts.
            weights: Importance weights, shape ``(b,)``; None: all 1, and the loss is the Trainer's own.
            wanted: Whether somebody reads the outputs: some trainers pay for theirs with one more forward pass.
            num_items: ``num_items_in_batch``.
            prove: Whether evidence is asked for.
        """
        assert self.head is not None
        self.scaled = self.without_labels = False
        computes = self.head.computes
        if weights is None and WEIGHTS not in batch and not computes:
            found = self._own(own, model, batch, wanted or prove or self._learns_scale(model))
            loss, outputs = found if isinstance(found, tuple) else (found, None)
            try:
                evidence = evidence_of(self, own, model, batch, loss, outputs, num_items) if prove else None
                return self._normalised(loss, outputs, batch, num_items, model), outputs, evidence
            except Exception as error:  # what a model, a loss or a batch is never stops a run: it is said once
                if should_reduce_batch_size(error):  # out of memory, which auto_find_batch_size waits for
                    raise
                return loss, outputs, f"{error}"
        evidence, outputs = None, None
        if prove and not computes:
            # One forward pass gives both losses; only the weighted one is descended.
            plain, outputs = self._own(own, model, {n: v for n, v in batch.items() if n != WEIGHTS}, True)
            try:
                evidence = evidence_of(self, own, model, batch, plain, outputs, num_items)
            except Exception as error:  # as above
                evidence = f"{error}"
        if not prove or computes or without_graph(self.head, outputs):
            outputs, self.without_labels = model(**self.head.model_inputs(batch)), True
        given = batch.get(WEIGHTS)
        weights = given if weights is None else weights if given is None else weights * given
        loss = self._weighted(model, batch, outputs, weights, num_items)
        if prove and computes:
            try:
                evidence = evidence_apart(self.head, outputs, batch)
            except Exception as error:
                evidence = f"{error}"
        return loss, outputs, evidence

    def _own(self, own: Callable[..., Any], model: nn.Module, batch: dict[str, Any], wanted: bool) -> Any:
        return self.fused(own, model, batch) if wanted and self.fused else own(model, dict(batch), wanted)

    def _learns_scale(self, model: nn.Module) -> bool:
        """Say whether this model's loss is needed at a scale that is not known."""
        assert self.scale is not None
        return model.training and self.step_items is not None and self.scale.over_step is None

    def _weighted(
        self, model: nn.Module, batch: dict[str, Any], outputs: Any, weights: Tensor | None, num_items: Any
    ) -> Tensor:
        assert self.head is not None and self.scale is not None
        losses = self.head.losses(outputs, batch)
        total = losses.sum() if weights is None else (weights * losses).sum()
        auxiliary = self.head.auxiliary(outputs)
        if not (model.training and self.step_items is not None):
            loss = total / self.head.items(batch)
            return loss if auxiliary is None else loss + auxiliary
        self.scaled = True
        loss = total / self.step_items * self.averaged
        if self._untouched and not self.head.computes:
            loss = loss * self.multiplied_by(num_items)
        if auxiliary is not None:
            # As often as the uniform step adds it, so that switching does not change its weight.
            loss = loss + self.scale.rescale(auxiliary * self.averaged, batch, self.step_items, ranks=1)
        return loss

    def _normalised(
        self, loss: Tensor, outputs: Any, batch: dict[str, Any], num_items: Tensor | int | None, model: nn.Module
    ) -> Tensor:
        """Bring the model's own loss of a micro-batch to a mean over the step."""
        assert self.scale is not None
        if not model.training or self.step_items is None:
            return loss
        if self.scale.over_step is None and not self.weights.state.whole:
            self.ask_scale(self.scale.learn, loss, outputs, batch, num_items)
        if self._untouched:
            return loss
        if not self.scale.over_step and not self.repairs:
            raise ValueError(
                "this loss is a mean over each micro-batch, and how it is brought to one over the optimizer step is "
                "left to your own code"
            )
        self.scaled = not self.scale.over_step
        # The Trainer has multiplied by the number of ranks already where it gave the model the count over all of them.
        return self.scale.rescale(loss, batch, self.step_items, self.averaged / self.multiplied_by(num_items))

    def multiplied_by(self, num_items: Any) -> int:
        """Give what the Trainer multiplies a loss by that is given such a count."""
        return self._multiplied if self.takes_items and num_items is not None else 1

    @property
    def _untouched(self) -> bool:
        """Whether a uniform step is left as the plain Trainer's on several ranks, each with one micro-batch.

        What is drawn then has its scale.
        """
        assert self.scale is not None
        left = self.ranks > 1 and not self.accumulates and (not self.repairs or self.weights.state.whole)
        return left and not self.scale.over_step

    def ask_scale(
        self, ask: Callable[..., Any], loss: Tensor, outputs: Any, batch: dict[str, Any], num_items: Any
    ) -> Any:
        """Find what a model's own loss is a mean over, by :meth:`.LossScale.learn` or :meth:`.LossScale.divisor`.

        Raises:
            ValueError: The losses of the examples have another mean, and no class weights can be why.
        """
        assert self.head is not None and self.scale is not None
        multiplied, takes = self.multiplied_by(num_items), num_items is not None and self.takes_items
        try:
            return ask(loss.detach() / multiplied, outputs, batch, num_items if takes else None)
        except ValueError:  # class weights, perhaps: the proof tells
            if self.accumulates or not has_classes(self.head.logits(outputs), batch, self.head):
                raise
            self.weights.state.whole = True
            return self.head.items(batch)

    def take_up(self, state: WeightState, rank: int) -> None:
        """Go on with class weights as a checkpoint has them; what ranks have not shared the first one takes."""
        self.weights = ClassWeights(state if rank == 0 else replace(state, recent=[0.0] * len(state.recent)))
        self.score_apart()

    def score_apart(self) -> None:
        """Where class weights are known, a user's function scores each example by its own loss alone."""
        if isinstance(self.head, FunctionHead):
            self.head.apart = self.weights.known

    def leave_to_trainer(self) -> None:
        """From now on the loss is the plain Trainer's."""
        self.head, self.step_items, self.scaled = None, None, False

    def completed(self, outputs: Any, loss: Tensor) -> Any:
        """Give outputs as the model gives them with labels, the loss in front, where it was called without any."""
        return with_loss(outputs, loss) if self.without_labels else outputs
