r"""Importance of each example: an upper bound of the norm of its gradient, from one forward pass.

Katharopoulos and Fleuret (2018, eq. 19) bound the norm of an example's gradient with respect to all parameters by a
constant times the norm of its gradient with respect to the outputs of the last layer,

.. math:: \hat G_i = \lVert \partial L_i / \partial z_i \rVert_2,

with :math:`z_i` the logits. Each loss of :mod:`hf_importance.heads.losses` has its closed form here;
:func:`logit_gradient_norm` is the general form by autograd, and :func:`gradient_norm` the true norm that all of them
bound. Scores are float32, shape ``(b,)``, non-negative, whatever the dtype of the logits, and carry no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL
from hf_importance.heads.losses import PIECE


@torch.no_grad()
def upper_bound(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Norm of ``softmax(logits) - target``, the gradient of the cross-entropy with respect to the logits.

    Args:
        logits: Shape ``(b, classes)``.
        labels: Class of each example, integer, shape ``(b,)``; -100 gives a score of 0.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.

    Returns:
        Shape ``(b,)``, float32, in ``[0, sqrt(2)]``.

    Note:
        The target is subtracted before squaring: the expanded form ``Σp² − 2p_y + 1`` loses all digits of a well
        fitted example in float32, and those are the ones that decide τ late in training.

    >>> upper_bound(torch.tensor([[0.0, 0.0], [20.0, 0.0]]), torch.tensor([0, 0]))
    tensor([7.0711e-01, 2.9149e-09])
    """
    labels = labels.view(-1, 1)
    ignored = labels == IGNORED_LABEL
    index = labels.masked_fill(ignored, 0).long()
    residual = logits.softmax(dim=-1, dtype=torch.float32).scatter_(1, index, 0.0)
    # 1 - p_y as the sum of the others: p_y itself rounds to 1 in float32 from a margin of 17 nats on.
    residual.scatter_(1, index, -residual.sum(dim=-1, keepdim=True))
    if label_smoothing:
        # The smoothed target is (1 - s) onehot + s / classes.
        residual -= label_smoothing / residual.shape[-1]
        residual.scatter_add_(1, index, torch.full_like(residual[:, :1], label_smoothing))
    return residual.norm(dim=-1).masked_fill(ignored.view(-1), 0.0)


@torch.no_grad()
def token_norms(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Norm of ``softmax(logits) - target`` of each token, in pieces: the probabilities never exist all at once.

    Args:
        logits: Shape ``(b, tokens, classes)``.
        labels: Class that each position of the logits is for, integer, shape ``(b, tokens)``; -100 gives 0.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.

    Returns:
        Shape ``(b, tokens)``, float32, in ``[0, sqrt(2)]``.
    """
    rows = max(1, PIECE // logits.shape[-1])
    pieces = zip(logits.flatten(0, 1).split(rows), labels.reshape(-1).split(rows), strict=True)
    return torch.cat([upper_bound(piece, targets, label_smoothing) for piece, targets in pieces]).view(labels.shape)


def sum_of_norms(norms: Tensor) -> Tensor:
    """Bound the norm of a sum of token gradients by the triangle inequality; reached where all point one way.

    Args:
        norms: Norm of each token's gradient, shape ``(b, tokens)``.

    Returns:
        Shape ``(b,)``.
    """
    return norms.sum(dim=-1)


def root_of_squares(norms: Tensor) -> Tensor:
    """Norm of the gradient with respect to the logits of all tokens together.

    It is also the norm that the sum of the token gradients has in expectation where they are uncorrelated.

    Args:
        norms: Norm of each token's gradient, shape ``(b, tokens)``.

    Returns:
        Shape ``(b,)``.
    """
    return norms.norm(dim=-1)


@torch.no_grad()
def binary_upper_bound(logits: Tensor, labels: Tensor) -> Tensor:
    """Norm of ``(sigmoid(logits) - labels) / labels_per_example``, the gradient of the binary cross-entropy.

    Args:
        logits: Shape ``(b, labels)``.
        labels: Target of each label, in ``[0, 1]``, shape ``(b, labels)``.

    Returns:
        Shape ``(b,)``, float32, in ``[0, 1 / sqrt(labels_per_example)]``.
    """
    return (logits.float().sigmoid() - labels.float()).norm(dim=-1) / logits.shape[-1]


@torch.no_grad()
def squared_error_upper_bound(logits: Tensor, labels: Tensor) -> Tensor:
    """Norm of ``2 (logits - labels) / outputs``, the gradient of the squared error.

    Args:
        logits: Shape ``(b, outputs)``.
        labels: Target of each output, shape ``(b, outputs)`` or, for one output, ``(b,)``.

    Returns:
        Shape ``(b,)``, float32.
    """
    return 2 * (logits.float() - labels.float().view_as(logits)).norm(dim=-1) / logits.shape[-1]


def logit_gradient_norm(losses: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Norm of the gradient of any per-example loss with respect to its logits, by autograd.

    Args:
        losses: Gives the loss of each example, or their sum, from the logits. Example ``i`` may depend on row ``i``
            alone.
        logits: Shape ``(b, ...)``, at least two-dimensional.

    Returns:
        Shape ``(b,)``, float32.
    """
    with torch.enable_grad():
        leaf = logits.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    return gradient.reshape(len(gradient), -1).norm(dim=-1)


def gradient_norm(losses: Iterable[Tensor], parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """True norm of each example's gradient with respect to all ``parameters``: a backward pass each, exact, slow.

    Args:
        losses: Loss of one example after the other, scalars with a graph; an iterator that makes them one at a time
            keeps the memory at one example's graph.
        parameters: Trainable parameters. Their ``grad`` is left alone.

    Returns:
        Shape ``(b,)``, float32.
    """
    parameters = list(parameters)
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms)
