r"""The two future works of the paper's section 5: what else a lower variance can be spent on.

Not claims but conjectures: "keep the variance stable and increase the convergence speed by automatically increasing
the learning rate proportionally to the batch increment", and "decreasing the batch size thus keeping again the
variance stable but reducing the time per update".

- ``constant_variance``: the gradient noise of uniform steps from fewer examples, by fresh and by remembered scores.
- ``learning_rate_*``: the learning rate raised with the batch-size gain τ², linearly or by its root.

The task is that of image_classification.py::

    python examples/paper/batch_gain.py                   # digits, under 3 minutes
    python examples/paper/batch_gain.py --full            # CIFAR-10, WRN-28-2

Measured (10 CPU seconds a run, seeds 0, 1, 2): training loss 0.0024 with the learning rate raised linearly, 0.0035 by
the root, 0.0053 as it is, 0.0024 uniform; smaller batches 0.0034 to 0.0095. Table: docs/paper.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import equal_time
import figures
import image_classification
from systems import MEASURED, PAPER, SYSTEMS, System
from transformers import TrainerCallback

from hf_importance import ImportanceTrainer

# A gain of 16 is the largest that is measured; four times the learning rate is as far as it is followed.
LARGEST_FACTOR = 4.0


class LearningRateByGain(TrainerCallback):
    """Multiplies the learning rates for the optimizer's step alone by the gain of a step that was drawn by importance.

    A step drawn by importance has the gradient noise of a uniform batch so many times as large. A larger batch is
    usually trained with a larger learning rate: in proportion (Goyal et al., 2017, https://arxiv.org/abs/1706.02677)
    or by its root (Krizhevsky, 2014, https://arxiv.org/abs/1404.5997). The schedule stays as it is.

    Args:
        trainer: Whose sampler knows the gain.
        power: Of the gain, by which rates are multiplied.
    """

    def __init__(self, trainer: ImportanceTrainer, power: float) -> None:
        self.trainer, self.power = trainer, power
        self.own: list[float] = []

    def factor(self) -> float:
        """Give the factor of the step in progress, in ``[1, LARGEST_FACTOR]``."""
        sampler = self.trainer.sampler
        gain = sampler.gain if sampler.active else 1.0
        return min(max(math.pow(gain, self.power), 1.0), LARGEST_FACTOR)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Raise them."""
        self.own, factor = [group["lr"] for group in optimizer.param_groups], self.factor()
        for group in optimizer.param_groups:
            group["lr"] *= factor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Put them back."""
        for group, own in zip(optimizer.param_groups, self.own, strict=True):
            group["lr"] = own


LINEAR, ROOT = (functools.partial(LearningRateByGain, power=power) for power in (1.0, 0.5))
OURS = "Katharopoulos and Fleuret, 2018, section 5"
FUTURE = {
    "uniform": SYSTEMS["uniform"],
    "upper_bound": SYSTEMS["upper_bound"],
    "learning_rate_linear": System(OURS, figures.ORANGE, PAPER, callbacks=[LINEAR]),
    "learning_rate_sqrt": System(OURS, figures.GREEN, PAPER, callbacks=[ROOT]),
    "constant_variance": System(OURS, figures.RED, {**PAPER, "importance_budget": "constant_variance"}),
    "constant_variance_systematic": System(OURS, figures.RED, {"importance_budget": "constant_variance"}, line="--"),
    "constant_variance_history": System(
        OURS,
        figures.SKY,
        {"importance_method": "history", "importance_budget": "constant_variance", **MEASURED},
        line="--",
    ),
}

if __name__ == "__main__":
    shown = FUTURE
    equal_time.compare(
        equal_time.parser(__doc__, shown).parse_args(), image_classification.experiment, shown, "batch_gain"
    )
