"""Loss of each example, differentiable, as the task heads of transformers define it.

Every function takes the logits and the labels of a batch of ``b`` examples and gives ``(b,)`` losses in float32,
whatever the dtype of the logits. Their mean is the model's own loss. The functions of :mod:`hf_importance.scores` are
the norms of their gradients with respect to the logits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # the label that losses of transformers leave out


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy of one class an example.

    Args:
        logits: Shape ``(b, classes)``.
        labels: Class of each example, integer, shape ``(b,)``; -100 leaves the example out (loss 0).
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.

    Returns:
        Shape ``(b,)``, non-negative, in nats.
    """
    return F.cross_entropy(
        logits.float(), labels.view(-1), reduction="none", ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing
    )


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross-entropy of several labels an example, averaged over the labels.

    Args:
        logits: Shape ``(b, labels)``.
        labels: Target of each label, in ``[0, 1]``, floating point, shape ``(b, labels)``.

    Returns:
        Shape ``(b,)``, non-negative, in nats.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(dim=-1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of one or several outputs, averaged over the outputs.

    Args:
        logits: Shape ``(b, outputs)``.
        labels: Target of each output, shape ``(b, outputs)`` or, for one output, ``(b,)``.

    Returns:
        Shape ``(b,)``, non-negative.
    """
    return (logits.float() - labels.float().view_as(logits)).square().mean(dim=-1)
