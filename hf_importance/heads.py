"""What a model's task head means: how its loss splits by example, its closed-form score, and what it counts.

The trainer asks a head four things about a batch: the loss of each example, its score, the number of items the loss
is an average over (a classifier has one an example), and the number of examples. A head is chosen from the model's
own task name, the suffix that transformers gives its classes (``...ForSequenceClassification``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_importance import losses, scores

CLASSIFICATION_TASKS = ("ForSequenceClassification", "ForImageClassification")


class Head(Protocol):
    """A loss that is a sum over examples. ``outputs`` is what the model gave, ``inputs`` the batch."""

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example, summed over its items: float32, shape ``(b,)``, differentiable."""
        ...

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the norm of each loss's gradient with respect to the logits: float32, shape ``(b,)``."""
        ...

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count what the mean of the loss is taken over: a scalar on the device of the labels."""
        ...


def logits_of(outputs: Any) -> Tensor:
    """Give the logits of a model's outputs, whether a dict or a tuple, with or without a loss in front."""
    entries = [outputs.get("logits")] if isinstance(outputs, Mapping) else outputs
    for entry in entries:
        # A loss in front of a tuple has no dimension.
        if isinstance(entry, Tensor) and entry.dim() > 0:
            return entry
    raise ValueError("The model's outputs hold no 'logits', and importance sampling scores an example by them.")


def labels_of(inputs: Mapping[str, Any]) -> Tensor:
    """Give the labels of a batch.

    Raises:
        ValueError: There are none.
    """
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(
            f"A batch of train_dataset has no 'labels', only {sorted(inputs)}. Importance sampling scores each "
            "example by its loss: give the dataset a column named 'label' or 'labels' (or a data_collator that makes "
            "one), or pass importance_sampling=False."
        )
    return labels


class ClassificationHead:
    """One class, several labels, or numbers for each example: sequence and image classification.

    Args:
        problem_type: ``"single_label_classification"``, ``"multi_label_classification"``, ``"regression"``, or None:
            told from the labels, as transformers does.
        num_labels: Classes, labels, or outputs of the model.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.
    """

    def __init__(self, problem_type: str | None, num_labels: int, label_smoothing: float) -> None:
        self.problem_type = problem_type
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing

    def _kind(self, labels: Tensor) -> str:
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example; see :class:`Head`."""
        logits, labels = logits_of(outputs), labels_of(inputs)
        kind = self._kind(labels)
        if kind == "single_label_classification":
            return losses.cross_entropy(logits, labels, self.label_smoothing)
        if kind == "multi_label_classification":
            return losses.binary_cross_entropy(logits, labels)
        return losses.squared_error(logits, labels)

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the score of each example; see :class:`Head`."""
        logits, labels = logits_of(outputs), labels_of(inputs)
        kind = self._kind(labels)
        if kind == "single_label_classification":
            return scores.upper_bound(logits, labels, self.label_smoothing)
        if kind == "multi_label_classification":
            return scores.binary_upper_bound(logits, labels)
        return scores.squared_error_upper_bound(logits, labels)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the examples whose label is not ignored; see :class:`Head`."""
        labels = labels_of(inputs)
        if self._kind(labels) == "single_label_classification":
            return (labels != losses.IGNORED_LABEL).sum()
        return torch.tensor(len(labels), device=labels.device)


class FunctionHead:
    """A user's ``compute_loss_func``, called on one example at a time.

    It is the only way to tell the examples of a foreign loss apart: ``num_items_in_batch=1`` makes the function a sum
    over the example's items. The trainer checks at the first step that these add up to what the function gives for
    the batch.

    Args:
        loss_func: ``compute_loss_func(outputs, labels, num_items_in_batch)``, as ``Trainer`` takes it.
    """

    def __init__(self, loss_func: Callable[..., Tensor]) -> None:
        self.loss_func = loss_func

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example; see :class:`Head`."""
        labels = labels_of(inputs)
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
        """Give the score of each example; see :class:`Head`."""
        logits, labels = logits_of(outputs), labels_of(inputs)

        def loss(leaf: Tensor) -> Tensor:
            replaced = _map_tensors(outputs, lambda value: leaf if value is logits else value.detach())
            return self.loss_func(replaced, labels, num_items_in_batch=1)

        return scores.logit_gradient_norm(loss, logits)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the labels that are not ignored, as ``Trainer`` does for ``num_items_in_batch``."""
        return (labels_of(inputs) != losses.IGNORED_LABEL).sum()


def head_of(model: nn.Module, label_smoothing: float, compute_loss_func: Callable[..., Tensor] | None) -> Head | None:
    """Choose the head of a model by its task.

    Args:
        model: The unwrapped model.
        label_smoothing: ``label_smoothing_factor`` of the training arguments.
        compute_loss_func: The user's loss, which takes the place of the model's own.

    Returns:
        The head, or None where the task is not one whose loss is known to split by example.
    """
    if compute_loss_func is not None:
        return FunctionHead(compute_loss_func)
    # `loss_type` is what transformers itself chooses the loss by; the class name covers models that are not its own.
    task = f"{getattr(model, 'loss_type', None)} {type(model).__name__}"
    config = getattr(model, "config", None)
    if config is not None and any(re.search(rf"{known}\b", task) for known in CLASSIFICATION_TASKS):
        return ClassificationHead(getattr(config, "problem_type", None), config.num_labels, label_smoothing)
    return None


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a model's outputs and keep their structure."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)(**{name: _map_tensors(entry, function) for name, entry in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(entry, function) for entry in value)
    return value
