"""The head of a user's own ``compute_loss_func``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL
from hf_importance.heads import scores
from hf_importance.heads.head import Head, logits_of


class FunctionHead(Head):
    """A user's ``compute_loss_func``, called on one example at a time.

    It is the only way to tell the examples of a foreign loss apart: ``num_items_in_batch=1`` makes the function a sum
    over the example's items. The trainer checks at the first step that these add up to what the function gives for
    the batch.

    Args:
        loss_func: ``compute_loss_func(outputs, labels, num_items_in_batch)``, as ``Trainer`` takes it.
        shift: Whether ``Trainer`` leaves out the first label of each row when it counts ``num_items_in_batch``.
    """

    def __init__(self, loss_func: Callable[..., Tensor], shift: bool = False) -> None:
        self.loss_func = loss_func
        self.shift = shift

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example; see :class:`Head`."""
        labels = self.labels(inputs)
        size = len(labels)

        def row_of(value: Tensor, i: int) -> Tensor:
            return value[i : i + 1] if value.dim() > 0 and len(value) == size else value

        return torch.stack(
            [
                self.loss_func(
                    _map_tensors(outputs, partial(row_of, i=i)), labels[i : i + 1], num_items_in_batch=1
                ).float()
                for i in range(size)
            ]
        )

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the score of each example, by autograd; see :class:`Head`."""
        logits, labels = logits_of(outputs), self.labels(inputs)

        def loss(leaf: Tensor) -> Tensor:
            replaced = _map_tensors(outputs, lambda value: leaf if value is logits else value.detach())
            return self.loss_func(replaced, labels, num_items_in_batch=1)

        return scores.logit_gradient_norm(loss, logits)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the labels that are not ignored, as ``Trainer`` does for ``num_items_in_batch``."""
        labels = self.labels(inputs)
        return ((labels[..., 1:] if self.shift else labels) != IGNORED_LABEL).sum()


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a model's outputs and keep their structure."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)(**{name: _map_tensors(entry, function) for name, entry in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(entry, function) for entry in value)
    return value
