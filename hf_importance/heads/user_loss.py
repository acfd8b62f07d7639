"""The head of a user's own ``compute_loss_func``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, WEIGHTS, batch_size_of
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

    cheap = False

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


class ExampleLossHead(Head):
    """A user's ``compute_example_losses(outputs, inputs)``: the loss of each example, whatever it is made of.

    It is what is trained on, in every step: the mean over the examples of an optimizer step, each multiplied by its
    importance weight.

    Args:
        losses_func: Gives the losses, shape ``(b,)``, differentiable, from the model's outputs and the whole batch.
            That of an example may depend on its own row alone.
        accepts: Entries of a batch that the model takes; None: all but the labels.
    """

    label_names = ()
    computes = True

    def __init__(self, losses_func: Callable[..., Tensor], accepts: frozenset[str] | None = None) -> None:
        self.losses_func, self.accepts = losses_func, accepts

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example; see :class:`Head`.

        Raises:
            ValueError: The user's function gives no vector with one loss an example.
        """
        found = self.losses_func(outputs, inputs)
        size = batch_size_of(inputs)
        if not isinstance(found, Tensor) or found.shape != (size,):
            raise ValueError(
                "compute_example_losses(outputs, inputs) must give a tensor with one loss an example, shape "
                f"({size},), but it gave {getattr(found, 'shape', type(found).__name__)}."
            )
        return found.float()

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the score of each example, by autograd; see :class:`Head`."""
        logits = logits_of(outputs)

        def loss(leaf: Tensor) -> Tensor:
            replaced = _map_tensors(outputs, lambda value: leaf if value is logits else value.detach())
            return self.losses_func(replaced, inputs)

        return scores.logit_gradient_norm(loss, logits)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the examples."""
        some = next(value for value in inputs.values() if isinstance(value, Tensor))
        return torch.full((), batch_size_of(inputs), device=some.device)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give the entries that the model takes; labels it is not given, so that it computes no loss of its own."""
        unwanted = ("labels", WEIGHTS)
        accepts = inputs.keys() if self.accepts is None else self.accepts
        return {name: value for name, value in inputs.items() if name in accepts and name not in unwanted}

    def labels(self, inputs: Mapping[str, Any]) -> Any:
        """Give the labels of a batch, if it has any."""
        return inputs.get("labels")


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a model's outputs and keep their structure."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)(**{name: _map_tensors(entry, function) for name, entry in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(entry, function) for entry in value)
    return value
