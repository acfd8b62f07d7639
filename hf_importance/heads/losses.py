"""Loss of each example, differentiable, as the task heads of transformers define it.

Every function takes the logits and the labels of a batch of ``b`` examples and gives ``(b,)`` losses in float32,
whatever the dtype of the logits. Their sum over a batch, divided by its items (examples, tokens or pixels that are not
ignored), is the model's own loss. The functions of :mod:`hf_importance.heads.scores` are
the norms of their gradients with respect to the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL

PIECE = 2**24  # probabilities of tokens held at a time where no gradient is wanted: 64 MiB in float32


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
        logits.float(),
        labels.view(-1).long(),
        reduction="none",
        ignore_index=IGNORED_LABEL,
        label_smoothing=label_smoothing,
    )


def token_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy of one class a token, summed over the tokens of an example.

    Args:
        logits: Shape ``(b, tokens, classes)``.
        labels: Class that each position of the logits is for, integer, shape ``(b, tokens)``; -100 leaves it out.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.

    Returns:
        Shape ``(b,)``, non-negative, in nats.
    """
    rows = labels.numel() if torch.is_grad_enabled() else max(1, PIECE // logits.shape[-1])
    pieces = zip(logits.flatten(0, 1).split(rows), labels.reshape(-1).split(rows), strict=True)
    found = torch.cat([cross_entropy(piece, targets, label_smoothing) for piece, targets in pieces])
    return found.view(labels.shape).sum(dim=-1)


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignored_label: int) -> Tensor:
    """Softmax cross-entropy of one class a pixel, summed over the pixels of an example.

    Args:
        logits: Shape ``(b, classes, height, width)``; interpolated to the size of the labels.
        labels: Class of each pixel, integer, shape ``(b, H, W)``.
        ignored_label: Class that is left out.

    Returns:
        Shape ``(b,)``, non-negative, in nats.
    """
    scaled = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    found = F.cross_entropy(scaled, labels.long(), reduction="none", ignore_index=ignored_label)
    return found.flatten(1).sum(dim=-1)


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
