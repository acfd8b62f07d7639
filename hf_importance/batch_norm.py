"""BatchNorm under importance sampling: what ties the examples of a batch together, and what can be done about it.

The weights make a resampled batch unbiased example by example. BatchNorm in training mode ties the examples together:
a batch of hard examples is normalised by the statistics of hard examples, and the running statistics, which
evaluation uses, follow them; no weight repairs either. The policies of the argument ``batch_norm`` are made of the
pieces here: running statistics that follow the pool, which is uniform and which the scoring pass sees anyway, and
importance-weighted moments. What each is worth is measured in docs/batch_norm.md.

Layers whose randomness or statistics stay within one example (dropout, LayerNorm, GroupNorm, InstanceNorm) need none
of this: whatever they draw, an example's gradient does not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Give the layers that normalise over the batch and keep running statistics (``SyncBatchNorm`` among them)."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats and layer.running_mean is not None]


@dataclass
class Moments:
    """Count, sum and sum of squares of what reached a layer, per channel; float32, on the layer's device."""

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Take the moments of a layer's input, shape ``(b, channels, ...)``."""
        inputs = inputs.detach().float()
        dims = [dim for dim in range(inputs.dim()) if dim != 1]
        count = torch.tensor(float(inputs.numel() // inputs.shape[1]), device=inputs.device)
        return cls(count, inputs.sum(dims), inputs.square().sum(dims))

    def __add__(self, other: Moments) -> Moments:
        """Give the moments of both."""
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)


@contextlib.contextmanager
def follow_pool(layers: list[_BatchNorm], sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """Move the running statistics of ``layers`` by what passes through them inside the block, as one batch.

    The layers are in ``eval()``, so inside the block they normalise with the statistics they have. Behind it these
    move once, by the layer's own momentum, towards mean and unbiased variance of all that came, exactly as one
    training forward pass of that batch would have moved them.

    Args:
        layers: BatchNorm layers.
        sum_over_ranks: For ``SyncBatchNorm`` on several ranks: adds up a tensor over them.
    """
    found: dict[_BatchNorm, Moments] = {}

    def collect(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments = Moments.of(inputs[0])
        found[layer] = found[layer] + moments if layer in found else moments

    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for layer, moments in found.items():
        if sum_over_ranks is not None and isinstance(layer, nn.SyncBatchNorm):
            size = len(moments.total)
            summed = sum_over_ranks(torch.cat([moments.count[None], moments.total, moments.squares]))
            moments = Moments(summed[0], summed[1 : size + 1], summed[size + 1 :])
        _move(layer, moments)


@torch.no_grad()
def _move(layer: _BatchNorm, moments: Moments) -> None:
    mean = moments.total / moments.count
    # The unbiased variance, as torch keeps it.
    variance = (moments.squares - moments.count * mean.square()).clamp(min=0) / (moments.count - 1).clamp(min=1)
    layer.num_batches_tracked += 1  # pyrefly: ignore[bad-assignment] (None only where nothing is tracked)
    momentum = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), momentum)


def normalise_weighted(layer: _BatchNorm, inputs: Tensor, weights: Tensor) -> Tensor:
    r"""Normalise as BatchNorm does in training, with importance-weighted moments.

    .. math:: \mu = \sum_i w_i x_i / \sum_i w_i, \qquad \sigma^2 = \sum_i w_i (x_i - \mu)^2 / \sum_i w_i

    They estimate the moments of a uniform batch, as the weighted loss estimates its loss, and gradients flow through
    them as they do in training. Weights of 1 give BatchNorm itself.

    Args:
        layer: BatchNorm layer; its running statistics are neither used nor moved.
        inputs: Shape ``(b, channels, ...)``.
        weights: Importance weights, positive, shape ``(b,)``.
    """
    values = inputs.float()
    shape = (1, -1) + (1,) * (inputs.dim() - 2)
    dims = [dim for dim in range(inputs.dim()) if dim != 1]
    share = (weights / weights.sum()).view(-1, *(1,) * (inputs.dim() - 1))
    share = share / (inputs.numel() // (inputs.shape[0] * inputs.shape[1]))
    mean = (share * values).sum(dims).view(shape)
    centred = values - mean
    variance = (share * centred.square()).sum(dims).view(shape)
    found = centred * torch.rsqrt(variance + layer.eps)
    if layer.affine:
        found = found * layer.weight.view(shape) + layer.bias.view(shape)
    return found.to(inputs.dtype)


class WeightedBatchNorm:
    """Makes BatchNorm layers normalise by the weighted moments of the batch while weights are set.

    Args:
        layers: BatchNorm layers; each gets a forward hook, which does nothing while :attr:`weights` is None.

    Attributes:
        weights: Importance weights of the batch in the forward pass, shape ``(b,)``, or None.
    """

    def __init__(self, layers: list[_BatchNorm]) -> None:
        self.weights: Tensor | None = None
        for layer in layers:
            layer.register_forward_hook(self._normalise)

    def _normalise(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.weights is None or len(inputs[0]) != len(self.weights):
            return None
        return normalise_weighted(layer, inputs[0], self.weights)
