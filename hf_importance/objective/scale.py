r"""One scale for the loss, whatever the model, the accumulation and the phase.

The law, in both phases, over all micro-batches and ranks of one optimizer step::

    loss = sum_i w_i S_i / items

with ``S_i`` the loss of example ``i`` summed over its items, ``w_i`` its importance weight (1 while off), and
``items`` what a uniform step would have counted.

Models differ in what their own loss is a mean over. Some divide by ``num_items_in_batch``, the items of the whole
step, and ``Trainer`` relies on that for every model whose ``forward`` takes ``**kwargs``. Many of those ignore the
count and give the mean over the micro-batch (BERT, DistilBERT, ResNet, ViT with several labels, ...); plain Trainer
then scales loss and gradient by the number of micro-batches. Which of the two a model does is told from the first
loss it gives, by comparing it with the losses of its examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL
from hf_importance.heads.head import Head

LOOKS = 10  # at a model's loss, while the two counts are the same
# In float32 the two agree to 1e-6. A loss in bf16 has 8 bits, and so has that of each example and each partial sum.
RELATIVE_TOLERANCE, COARSE = 0.005, 0.02
ABSOLUTE_TOLERANCE = 1e-4


class LossScale:
    """Learns from the first micro-batch whether a loss is a mean over it or over the whole step.

    Args:
        head: How the loss splits by example.
        shifts_labels: Whether ``Trainer`` leaves out the first label of each row when it counts the step's items.

    Attributes:
        over_step: True for a loss that is already divided by the step's items, False for one that is a mean over its
            micro-batch, None while it is not known.
    """

    def __init__(self, head: Head, shifts_labels: bool = False) -> None:
        self.head = head
        self.shifts_labels = shifts_labels
        self.over_step: bool | None = None
        self.checked = False
        self._looks = 0

    def learn(self, loss: Tensor, outputs: Any, inputs: Mapping[str, Any], step_items: Tensor | float | None) -> None:
        """Compare a model's loss with the losses of its examples. It waits for the device; one call is enough.

        Args:
            loss: The model's own loss for a micro-batch of weight 1, a scalar.
            outputs: What the model returned.
            inputs: The micro-batch, with its labels.
            step_items: The count that the model was given as ``num_items_in_batch``, if it was given one.

        Raises:
            ValueError: It is neither of the two, so the head does not describe this model's loss.
        """
        with torch.no_grad():
            total = float(self.head.losses(outputs, inputs).sum())
            auxiliary = self.head.auxiliary(outputs)
        items, own = float(self.head.items(inputs)), float(loss)
        if auxiliary is not None:
            own -= float(auxiliary)
        if items == 0 or not (math.isfinite(total) and math.isfinite(own)):
            return  # nothing to learn from; the trainer reports both elsewhere
        means = {False: total / items}
        if step_items is not None:
            means[True] = total / float(step_items)
        over_step = min(means, key=lambda key: abs(means[key] - own))
        error = abs(means[over_step] - own)
        relative = COARSE if loss.dtype in (torch.bfloat16, torch.float16) else RELATIVE_TOLERANCE
        if error > relative * abs(own) + ABSOLUTE_TOLERANCE:
            raise ValueError(
                f"the loss of the first batch is {own:.6g}, but the losses of its examples have the mean "
                f"{means[False]:.6g}: it is not the plain mean that its task stands for (class weights, an auxiliary "
                "term, or a compute_loss_func that is no sum over examples divided by num_items_in_batch)"
            )
        self.checked = True
        # With all items in one micro-batch the two are the same.
        if step_items is None or abs(means[True] - means[False]) > 4 * error:
            self.over_step = over_step

    def divisor(
        self, loss: Tensor, outputs: Any, inputs: Mapping[str, Any], step_items: Tensor | float
    ) -> Tensor | float:
        """Give the count that a model's loss was divided by, learning which of the two it is; as :meth:`learn`.

        Where a step is one micro-batch the two may be the same for ever: after some looks no more are waited for.
        """
        if self.over_step is None and self._looks < LOOKS:
            self._looks += 1
            self.learn(loss, outputs, inputs, step_items)
        if self.over_step is not None:
            return step_items if self.over_step else self.head.items(inputs)
        with torch.no_grad():
            total, own, items = self.head.losses(outputs, inputs).sum(), loss.detach(), self.head.items(inputs)
            auxiliary = self.head.auxiliary(outputs)
            own = own if auxiliary is None else own - auxiliary
            return torch.where((total / items - own).abs() <= (total / step_items - own).abs(), items, step_items)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count a batch's items as a uniform step does.

        They are the head's, but where a loss is divided by the count that ``Trainer`` makes, it is that one. The two
        differ for models that ignore another label than -100, and for those that shift their labels without a class
        name that says so (``GPT2LMHeadModel``): there ``Trainer`` counts the first token of each row as well.
        """
        if not self.over_step:
            return self.head.items(inputs)
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs["labels"][..., 1:] if self.shifts_labels else inputs["labels"]
        return (labels != IGNORED_LABEL).sum()

    def rescale(self, loss: Tensor, inputs: Mapping[str, Any], step_items: Tensor | float, ranks: float) -> Tensor:
        """Turn a mean over the micro-batch into its share of the mean over the step.

        Args:
            loss: The model's own loss for the micro-batch.
            inputs: The micro-batch, with its labels.
            step_items: Items of the whole optimizer step, over all ranks that ``ranks`` counts.
            ranks: Number of processes whose gradients are averaged, over that by which the loss is multiplied already.

        Returns:
            The share; for equal micro-batches exactly the loss divided by their number, as plain Trainer has it for
            models that take no loss arguments.
        """
        if self.over_step:
            return loss
        return loss / (step_items / (self.head.items(inputs) * ranks))
