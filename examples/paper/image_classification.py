r"""Image classification at equal time, every system (paper, section 4.2, figure 3).

Claim: a wide residual network trained for a fixed time reaches a training loss an order of magnitude lower on CIFAR-10
(about 3 times on CIFAR-100) than with uniform sampling, and a lower test error; of the others only "loss" helps, and
only on CIFAR-10.

SGD with momentum 0.9, weight decay 5e-4, learning rate 0.1 divided by 5 at 40 % and at 80 % of the time, b = 128,
B = 640, τ_th = 1.5 (with the root). These settings are recalled from the authors' code, not checked against it. The
default is smaller: digits, WRN-10-1, b = 32, B = 160, learning rate 0.05, 2.5 CPU seconds a run::

    python examples/paper/image_classification.py                    # under 3 minutes
    python examples/paper/image_classification.py --dataset cifar10 --data path/to/data --side 16 --seconds 60
    python examples/paper/image_classification.py --full --dataset cifar100

Measured (digits, 10 CPU seconds a run, seeds 0, 1, 2): the claim does not hold there. Training loss 0.0030 by the
upper bound, 0.0013 uniform, 0.0006 by top-k: a step costs 2.5 uniform ones, at a τ of 2. docs/paper.md.
"""

from __future__ import annotations

import argparse

import equal_time
import tasks
from equal_time import Experiment, divided_by_five
from networks import WideResNetConfig, WideResNetForImageClassification
from systems import SYSTEMS


def model_config(full: bool, channels: int, classes: int) -> WideResNetConfig:
    """Give the paper's WRN-28-2, or the WRN-10-1 that a CPU trains in seconds."""
    size = {"depth": 28, "widen": 2} if full else {"depth": 10, "widen": 1}
    return WideResNetConfig(**size, num_channels=channels, num_labels=classes)


def experiment(given: argparse.Namespace) -> Experiment:
    """Load the data and say how is trained."""
    name = given.dataset or ("cifar10" if given.full else "digits")
    if name == "digits":
        train, test = tasks.digits()
    else:
        train, test = tasks.pictures(name, given.data, given.side or 32, name.endswith("mnist"), given.limit)
        # The paper augments beforehand, to 1.5 million pictures (recalled); here each visit is augmented anew.
        train.flip, train.shift = not name.endswith("mnist"), train.pixels.shape[-1] // 8
    config = model_config(given.full, train.pixels.shape[1], int(train.labels.max()) + 1)
    return Experiment(
        new_model=lambda: WideResNetForImageClassification(config),
        train=train,
        test=test,
        batch_size=128 if given.full else 32,
        ratio=5.0,
        tau_threshold=1.5,
        learning_rate=0.1 if given.full else 0.05,
        seconds=3600.0 if given.full else 2.5,  # an hour a run is ours; the paper's number is lost from its text
        schedule=divided_by_five,
        arguments={"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4, "max_grad_norm": 0.0},
        recompute_every=600 if given.full else 100,
    )


if __name__ == "__main__":
    shown = SYSTEMS
    equal_time.compare(equal_time.parser(__doc__, shown).parse_args(), experiment, shown, "image_classification")
