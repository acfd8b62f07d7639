"""The loss of a micro-batch: weighted where the batch says so, of one scale whatever model and accumulation.

It knows a model and how its loss splits by example; it knows no run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.batches.entries import WEIGHTS
from hf_importance.heads.head import Head
from hf_importance.objective.batch_norm import FEWEST_FOR_BATCH_NORM, batch_norm_layers
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
        checking: Whether the head is compared with the model's own loss.

    Attributes:
        step_items: Items of the optimizer step in progress, over all ranks; None where each micro-batch is a step of
            its own.
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
        checking: bool,
    ) -> None:
        self.head = head
        self.scale = None if head is None else LossScale(head, shifts_labels)
        self.step_items: Tensor | float | None = None
        self.ranks, self.averaged = ranks, averaged
        self._takes_items, self._multiplied, self._checking = takes_items, multiplied, checking
        self._layers = batch_norm_layers(model)
        self._frozen = batch_norm == "frozen"
        if self._layers and (checking or self._frozen):
            logger.info(
                "%s has %d BatchNorm layers: batch_norm=%r, %s.",
                type(model).__name__,
                len(self._layers),
                batch_norm,
                _BATCH_NORM_MEANING[batch_norm],
            )

    @property
    def fewest(self) -> int:
        """Examples that a batch keeps at least: BatchNorm must not normalise by a handful of hard ones."""
        return FEWEST_FOR_BATCH_NORM if self._layers and not self._frozen else 1

    # ---- Items ----

    def count(self, batches: list) -> None:
        """Count the items of a step on this rank, where its loss will be brought to their mean."""
        self.step_items = None
        if self.head is None or self.scale is None or not batches:
            return
        if not self._checking and any(name not in batches[0] for name in self.head.label_names):
            self.leave_to_trainer()
            return
        self.head.labels(batches[0])
        # On several ranks always: they may learn the scale at different steps, and must all take part in the sum.
        several = len(batches) > 1 and (not self.scale.over_step or WEIGHTS in batches[0])
        if self.ranks > 1 or several:
            self.step_items = torch.stack([self.scale.items(batch) for batch in batches]).sum()

    # ---- Loss ----

    def hold_batch_norm(self, training: bool) -> None:
        """Let BatchNorm normalise in this forward pass as the policy says."""
        if training and self._frozen:
            for layer in self._layers:
                layer.eval()  # until the next training_step calls model.train()

    def applies(self, training: bool, batch: dict[str, Any]) -> bool:
        """Whether the loss of a batch is anything but the Trainer's own business."""
        return self.head is not None and (training or WEIGHTS in batch)

    def loss(
        self,
        own: Callable[[dict[str, Any], bool], Any],
        model: nn.Module,
        batch: dict[str, Any],
        wanted: bool,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """Give the loss of a micro-batch, and the model's outputs.

        Args:
            own: The Trainer's ``compute_loss(inputs, return_outputs)``.
            model: What is called.
            batch: The micro-batch, with its weights, if any.
            wanted: Whether somebody reads the outputs: some trainers pay for theirs with one more forward pass.
            num_items: ``num_items_in_batch``.
        """
        if WEIGHTS in batch:
            return self._weighted(model, batch)
        wanted = wanted or self._learns_scale()
        found = own(dict(batch), wanted)  # the Trainer takes the labels out for label smoothing
        loss, outputs = found if wanted else (found, None)
        return self._normalised(loss, outputs, batch, num_items), outputs

    def _learns_scale(self) -> bool:
        """Say whether this model's loss is still to be checked, or its scale needed and not known."""
        assert self.scale is not None
        unknown = self.step_items is not None and self.scale.over_step is None
        return unknown or (self._checking and not self.scale.checked)

    def _weighted(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        assert self.head is not None and self.scale is not None
        outputs = model(**self.head.model_inputs(batch))
        total = (batch[WEIGHTS] * self.head.losses(outputs, batch)).sum()
        auxiliary = self.head.auxiliary(outputs)
        if not (model.training and self.step_items is not None):
            loss = total / self.head.items(batch)
            return (loss if auxiliary is None else loss + auxiliary), outputs
        loss = total / self.step_items * self.averaged
        if auxiliary is not None:
            # As often as the uniform step adds it, so that switching does not change its weight.
            loss = loss + self.scale.rescale(auxiliary * self.averaged, batch, self.step_items, ranks=1)
        return loss, outputs

    def _normalised(self, loss: Tensor, outputs: Any, batch: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Bring the model's own loss of a micro-batch to a mean over the step."""
        assert self.scale is not None
        takes_items = num_items is not None and self._takes_items
        # The Trainer has multiplied by the number of ranks already where it gave the model the count over all of them.
        multiplied = self._multiplied if takes_items else 1
        if self._learns_scale():
            try:
                self.scale.learn(loss.detach() / multiplied, outputs, batch, num_items if takes_items else None)
            except ValueError:
                if self._checking:
                    raise
                self.leave_to_trainer()
                return loss
        if self.step_items is None:
            return loss
        return self.scale.rescale(loss, batch, self.step_items, self.averaged / multiplied)

    def leave_to_trainer(self) -> None:
        """The head does not know this loss: from now on it is the plain Trainer's."""
        self.head, self.step_items = None, None
