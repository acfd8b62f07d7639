"""Class weights of a loss are learnt from its rows, and then importance sampling is on, with the plain Trainer's mean.

The oracle is the plain Trainer's step itself: torch's weighted mean over uniform batches, whose expectation is not the
weighted mean over all examples, for the sum that it divides by holds the example that it weighs.
"""

import pytest
import torch
from scripts import BATCH, CLASSES, RARE, Classifier, Script, check_mean, check_switched_off, make, points, run, same
from test_right_or_off import after_super, own_loss, weighted
from torch.nn import functional as F

METHODS = ("presample", "history", "auto")


def by_function(outputs, labels, num_items_in_batch=None):
    return weighted(outputs["logits"], labels)


def by_count(logits, labels):
    return (RARE[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()


def of_supers_outputs(trainer, model, loss, logits, labels):
    return weighted(logits, labels)


WAYS = {
    "overridden": Script(own_loss(weighted)),
    "of super's outputs": Script(after_super(of_supers_outputs)),
    "below": Script(own_loss(weighted), below=True),
    "in the model": Script(model=lambda: Classifier(RARE)),
    "function": Script(given={"compute_loss_func": by_function}),
    "by count": Script(own_loss(by_count)),
}


def uniform_mean(loss, batch=BATCH, draws=20000):
    """Give the mean gradient of uniform batches, by drawing very many: parameters of the layer, weight then bias."""
    rows, model = points(), Classifier()
    x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    generator = torch.Generator().manual_seed(1)
    subsets = torch.rand(draws, len(x), generator=generator).argsort(1)[:, :batch]
    logits = model.logits(x).detach()[subsets].requires_grad_()
    for part, own in zip(logits, labels[subsets], strict=True):
        loss(part, own).backward()
    found = logits.grad
    return None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a(way, method):
    ours = run(WAYS[way], method, max_steps=400, learning_rate=0.0, logging_steps=50)
    print(way, method, ours.said, ours.steps_on, ours.trainer._objective.weights.state)
