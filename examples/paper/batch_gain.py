r"""The two future works of the paper's section 5: what else a lower variance can be spent on.

Not claims but conjectures: "keep the variance stable and increase the convergence speed by automatically increasing
the learning rate proportionally to the batch increment", and "decreasing the batch size thus keeping again the
variance stable but reducing the time per update".

- ``constant_variance``: the gradient noise of uniform steps from fewer examples, by fresh and by remembered scores.
- ``learning_rate_*``: the learning rate raised with the batch-size gain τ², linearly or by its root.

The task is that of image_classification.py::

    python examples/paper/batch_gain.py                   # digits, under 3 minutes
    python examples/paper/batch_gain.py --full            # CIFAR-10, WRN-28-2

Measured (6 CPU seconds a run, seeds 0, 1, 2): training loss 0.0017 with the learning rate raised linearly, 0.0028 by
the root, 0.0042 as it is, 0.0024 uniform; smaller batches 0.0038 to 0.0071. Table: examples/paper/README.md.
"""

from __future__ import annotations

import equal_time
import figures
import image_classification
from systems import PAPER, SYSTEMS, System

OURS = "Katharopoulos and Fleuret, 2018, section 5"
FUTURE = {
    "uniform": SYSTEMS["uniform"],
    "upper_bound": SYSTEMS["upper_bound"],
    "learning_rate_linear": System(OURS, figures.ORANGE, {**PAPER, "learning_rate_scaling": "linear"}),
    "learning_rate_sqrt": System(OURS, figures.GREEN, {**PAPER, "learning_rate_scaling": "sqrt"}),
    "constant_variance": System(OURS, figures.RED, {**PAPER, "importance_budget": "constant_variance"}),
    "constant_variance_systematic": System(
        OURS, figures.RED, {"resampling": "systematic", "importance_budget": "constant_variance"}, line="--"
    ),
    "constant_variance_history": System(
        OURS, figures.SKY, {"importance_method": "history", "importance_budget": "constant_variance"}, line="--"
    ),
}

if __name__ == "__main__":
    shown = FUTURE
    equal_time.compare(
        equal_time.parser(__doc__, shown).parse_args(), image_classification.experiment, shown, "batch_gain"
    )
