"""The loss of a training step: weighted where the batch says so, of one scale whatever model and accumulation.

The part of the trainer that computes losses; :mod:`hf_importance.trainer` decides what is trained on.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_importance.batch_norm import WeightedBatchNorm, batch_norm_layers
from hf_importance.batches import WEIGHTS
from hf_importance.checks import unknown_head
from hf_importance.heads import Head, head_of
from hf_importance.normalisation import LossScale
from hf_importance.task_heads import TokenHead
from hf_importance.training_args import ImportanceArguments
from hf_importance.visits import without_index
from hf_importance.vocabulary import SlicedHead

logger = logging.getLogger(__name__)

_BATCH_NORM_MEANING = {
    "batch": "importance steps normalise with the batch, and the running statistics follow the uniform pool",
    "weighted": "importance steps normalise with importance-weighted moments; running statistics follow the pool",
    "running": "importance steps normalise with the running statistics, and these follow the uniform pool",
    "frozen": "the running statistics stay as they are, in every step",
    "untouched": "left alone, so that in importance steps the running statistics follow the hard examples",
}


class WeightedLossMixin(Trainer):
    """``compute_loss`` for batches with an entry ``importance_weights``, and of the right scale for all others.

    Attributes:
        importance_args: The fields of :class:`ImportanceArguments`, the user's or the defaults.
    """

    importance_args: ImportanceArguments
    _sampling: bool
    # Whether the outputs of this step's training passes are still to be scored.
    _awaiting = False
    # Items of the optimizer step in progress, over all ranks; None where each micro-batch is a step of its own.
    _step_items: Tensor | float | None = None

    def _keep_scores(self, outputs: Any, batch: dict[str, Any], index: Tensor | None) -> None:
        raise NotImplementedError

    def _look_at_model(self) -> None:
        """Find the head and the BatchNorm layers of the model."""
        model = self.accelerator.unwrap_model(self.model)
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        self._head: Head | None = head_of(model, smoothing, self.compute_loss_func)
        if self._head is None and self._sampling:
            raise ValueError(unknown_head(model))
        if self._head is not None:
            self._loss_scale = LossScale(self._head, getattr(self, "_loss_shifts_labels", False))
            # Parameters that are sharded over ranks are whole only inside the model's own forward.
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            sliceable = isinstance(self._head, TokenHead) and not sharded
            self._sliced_head = SlicedHead(model, self._head) if sliceable else None
            # compute_loss below gives every micro-batch its share of the step, so training_step must not divide again.
            self.loss_is_scaled_for_ga = True
        self._batch_norm = batch_norm_layers(self.model)
        self._tracking = True
        weighted = self._sampling and self.importance_args.batch_norm == "weighted"
        # The weighted moments of one rank are not those of all: SyncBatchNorm normalises with its running statistics.
        own = [layer for layer in self._batch_norm if not isinstance(layer, nn.SyncBatchNorm)]
        self._weighted_batch_norm = WeightedBatchNorm(own) if weighted and own else None
        if self._batch_norm and (self._sampling or self.importance_args.batch_norm == "frozen"):
            logger.info(
                "%s has %d BatchNorm layers: batch_norm=%r, %s.",
                type(self.model).__name__,
                len(self._batch_norm),
                self.importance_args.batch_norm,
                _BATCH_NORM_MEANING[self.importance_args.batch_norm],
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss as ``Trainer`` does, weighted by the batch's ``importance_weights``, if any.

        In training it hands the outputs on to be scored, and sees to it that the loss is a mean over the items of the
        whole optimizer step also for models that ignore ``num_items_in_batch``.
        """
        inputs, index = without_index(inputs)
        self._hold_batch_norm(model.training, inputs.get(WEIGHTS))
        if self._head is None or not (model.training or WEIGHTS in inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # the Trainer takes the labels out of `inputs` for label smoothing
        if WEIGHTS in inputs:
            loss, outputs = self._weighted_loss(model, batch)
        else:
            # Some trainers pay for their outputs with one more forward pass: ask only where somebody reads them.
            wanted = return_outputs or self._reads_outputs()
            found = super().compute_loss(model, inputs, wanted, num_items_in_batch)
            loss, outputs = found if wanted else (found, None)
            loss = self._normalised(loss, outputs, batch, num_items_in_batch)
        if self._awaiting and model.training:
            self._keep_scores(outputs, batch, index)
        return (loss, outputs) if return_outputs else loss

    def _reads_outputs(self) -> bool:
        """Say whether scores or the scale of the loss are still to be had from this forward pass."""
        return (self._sampling and self._awaiting) or self._learns_scale()

    def _learns_scale(self) -> bool:
        """Say whether this model's loss is still to be checked, or its scale needed and not known."""
        unknown = self._step_items is not None and self._loss_scale.over_step is None
        return unknown or (self._sampling and not self._loss_scale.checked)

    def _hold_batch_norm(self, training: bool, weights: Tensor | None) -> None:
        """Let BatchNorm normalise in this forward pass as the policy says."""
        policy = self.importance_args.batch_norm
        if self._weighted_batch_norm is not None:
            self._weighted_batch_norm.weights = weights if training else None
        if not training or policy == "untouched":
            return
        if policy == "batch":
            if self._tracking != (weights is None):
                self._tracking = weights is None
                for layer in self._batch_norm:
                    # Without it torch normalises with the batch and leaves the running statistics alone.
                    layer.track_running_stats = self._tracking
        elif policy == "frozen" or weights is not None:
            for layer in self._batch_norm:
                layer.eval()  # until the next training_step calls model.train()

    def _weighted_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        outputs = model(**self._head.model_inputs(batch))
        total = (batch[WEIGHTS] * self._head.losses(outputs, batch)).sum()
        auxiliary = self._head.auxiliary(outputs)
        if not (model.training and self._step_items is not None):
            loss = total / self._head.items(batch)
            return (loss if auxiliary is None else loss + auxiliary), outputs
        loss = total / self._step_items * self._averaged_ranks
        if auxiliary is not None:
            # As often as the uniform step adds it, so that switching does not change its weight.
            loss = loss + self._loss_scale.rescale(auxiliary * self._averaged_ranks, batch, self._step_items, ranks=1)
        return loss, outputs

    def _normalised(self, loss: Tensor, outputs: Any, batch: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Bring the model's own loss of a micro-batch to a mean over the step."""
        takes_items = num_items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        # The Trainer has multiplied by the number of ranks already where it gave the model the count over all of them.
        multiplied = self._ranks if takes_items and self.args.average_tokens_across_devices else 1
        scale = self._loss_scale
        if self._learns_scale():
            try:
                scale.learn(loss.detach() / multiplied, outputs, batch, num_items if takes_items else None)
            except ValueError:
                if self._sampling:
                    raise
                self._leave_loss_to_trainer()
                return loss
        if self._step_items is None:
            return loss
        return scale.rescale(loss, batch, self._step_items, self._averaged_ranks / multiplied)

    def _leave_loss_to_trainer(self) -> None:
        """Nobody asked for importance sampling, and the head does not know this loss: it is the plain Trainer's."""
        self._head, self.loss_is_scaled_for_ga, self._step_items = None, type(self).loss_is_scaled_for_ga, None

    # ---- Ranks ----

    @property
    def _ranks(self) -> int:
        return self.accelerator.num_processes // self.get_tp_size()

    @property
    def _averaged_ranks(self) -> int:
        """Number of ranks that an item count spans, so that a sum divided by it must be multiplied by again.

        Where nobody asked for importance sampling nothing of ours crosses the network, and each rank counts its own.
        """
        return self._ranks if self._sampling and self.args.average_tokens_across_devices else 1

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        """Add up numbers over all ranks in one collective; on one rank nothing crosses any network."""
        if self._ranks == 1:
            return values
        return self._sum_tensor_over_ranks(torch.tensor(values, dtype=torch.float64, device=self.args.device)).tolist()

    def _sum_tensor_over_ranks(self, tensor: Tensor) -> Tensor:
        if self._ranks == 1:
            return tensor
        return self.accelerator.reduce(tensor, "sum")  # pyrefly: ignore[bad-return] (a tensor for a tensor)
