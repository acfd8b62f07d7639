"""BatchNorm under importance sampling: what ties the examples of a batch together.

The weights make a resampled batch unbiased example by example. BatchNorm in training mode ties the examples together:
a batch of hard examples is normalised by the statistics of hard examples, and the running statistics, which
evaluation uses, follow them; no weight repairs either. So an importance step keeps a number of examples at least, and
``batch_norm="frozen"`` normalises with the running statistics as they are, in every step. What else was tried, and
what each is worth: docs/batch_norm.md.

Layers whose randomness or statistics stay within one example (dropout, LayerNorm, GroupNorm, InstanceNorm) need none
of this: whatever they draw, an example's gradient does not depend on its neighbours.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Examples that a model with BatchNorm keeps at least, where the batch has as many: below, its moments are too noisy.
# For ResNet-50 see Wu and He, 2018, https://arxiv.org/abs/1803.08494, table 2; for MobileNetV2 docs/batch_norm.md.
FEWEST_FOR_BATCH_NORM = 16


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Give the layers that normalise over the batch and keep running statistics (``SyncBatchNorm`` among them)."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats and layer.running_mean is not None]
