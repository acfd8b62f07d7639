r"""The learning rate raised with the gain: the paper's section 5 names it as future work.

A step drawn by importance has the gradient noise of a uniform batch ``gain`` times as large. A larger batch is usually
trained with a larger learning rate: in proportion (Goyal et al., 2017, https://arxiv.org/abs/1706.02677) or by its
root (Krizhevsky, 2014, https://arxiv.org/abs/1404.5997). Off by default: it makes each step longer, and whether
training stays stable is the task's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback

RULES = ("linear", "sqrt")
# A gain of 16 is the largest that is measured; four times the user's learning rate is as far as we follow it.
LARGEST_FACTOR = 4.0


def learning_rate_factor(gain: float, rule: str) -> float:
    """What one optimizer step's learning rate is multiplied by.

    Args:
        gain: How many times as large a uniform batch would be with the same noise; below 1 it counts as 1.
        rule: ``"linear"`` or ``"sqrt"``.

    Returns:
        In ``[1, LARGEST_FACTOR]``.

    >>> learning_rate_factor(2.25, "linear"), learning_rate_factor(2.25, "sqrt"), learning_rate_factor(9.0, "linear")
    (2.25, 1.5, 4.0)
    """
    factor = gain if rule == "linear" else math.sqrt(gain)
    return min(max(factor, 1.0), LARGEST_FACTOR)


class LearningRateCallback(TrainerCallback):
    """Multiplies the learning rates for the optimizer's step alone: schedule, log and checkpoint keep the user's.

    Args:
        factor: Gives the factor of the step in progress.
    """

    def __init__(self, factor: Callable[[], float]) -> None:
        self.factor = factor
        self._own: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        """Raise them."""
        factor = self.factor()
        if factor == 1:
            return
        self._own = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        """Put them back."""
        for group, own in zip(optimizer.param_groups, self._own, strict=False):
            group["lr"] = own
        self._own = []
