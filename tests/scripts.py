"""Tiny scripts such as people have, run by the plain ``Trainer`` and by this package, and what came of each.

A script is a class of trainer, a model, data and arguments. What changes from one run to the other is the class that
the trainer is made of. The law that is checked: *right or off*. Importance sampling is on only where it may be, and
then its mean gradient is that of the plain Trainer; else the run is the plain Trainer's to the last bit, and one
warning says why.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import toys
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_importance import ImportanceMixin, ImportanceTrainer

EXAMPLES, FEATURES, CLASSES, BATCH = 96, 4, 3, 8
RARE = torch.tensor([0.4, 1.0, 4.0])  # class weights

# ---- Data and models ----


def points(examples=EXAMPLES, **columns):
    """Points with a class each, the last one rare, and one in eight of another class than it looks."""
    generator = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), examples, True, generator=generator)
    x = torch.randn(examples, FEATURES, generator=generator)
    x[:, :CLASSES] += 3 * F.one_hot(label, CLASSES)
    label[::8] = (label[::8] + 1) % CLASSES
    rows = [{"x": x[i], "labels": label[i]} for i in range(examples)]
    made = {name: make(label) for name, make in columns.items()}
    return [{**row, **{name: values[i] for name, values in made.items()}} for i, row in enumerate(rows)]


def several(examples=EXAMPLES):
    """The same points with several labels each."""
    return [{"x": row["x"], "labels": (row["x"][:CLASSES] > 0.5).float()} for row in points(examples)]


def tokens(examples=EXAMPLES):
    """Texts of six tokens with a class for each, of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 12, (examples, 6), generator=generator)
    labels = (words % CLASSES * (words > 2)).masked_fill(words == 11, -100)
    noise = torch.rand(words.shape, generator=generator) < 0.1
    labels = torch.where(noise & (labels >= 0), (labels + 1) % CLASSES, labels)
    return [{"input_ids": words[i], "labels": labels[i]} for i in range(examples)]


class Classifier(nn.Module):
    """One layer, trained a little, or as fresh as a new head: all classes have the same probability.

    Args:
        weight: Of each class, in its own loss.
        fresh: Whether it is untrained.
    """

    loss_type = "ForSequenceClassification"

    def __init__(self, weight=None, fresh=False):
        super().__init__()
        self.layer, self.weight = nn.Linear(FEATURES, CLASSES), weight
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.zero_()
            if not fresh:
                self.layer.weight[:, :CLASSES] = torch.eye(CLASSES)

    def logits(self, x):
        return self.layer(x)

    def loss(self, logits, labels):
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.weight)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight=self.weight)

    def forward(self, x, labels=None):
        outputs = {"logits": self.logits(x)}
        return outputs if labels is None else {"loss": self.loss(outputs["logits"], labels), **outputs}


class Tagger(Classifier):
    """A class for each token; its loss is a mean over the batch."""

    loss_type = "ForTokenClassification"

    def __init__(self, weight=None):
        super().__init__(weight)
        torch.manual_seed(0)
        self.words = nn.Embedding(12, FEATURES)

    def forward(self, input_ids, labels=None):
        return super().forward(self.words(input_ids), labels)


class Counting(Classifier):
    """Divides its loss by the items of the optimizer step, as language models do."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.logits(x)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, labels, self.weight, reduction="sum" if num_items_in_batch else "mean")
        return {"loss": loss / num_items_in_batch if num_items_in_batch else loss, "logits": logits}


# ---- Scripts and runs ----


@dataclass(frozen=True)
class Script:
    """What a user has written.

    Attributes:
        trainer: Makes the trainer's class of the class that it is to inherit from.
        model: Makes the model.
        data: Makes the data.
        settings: Arguments of training.
        given: Further arguments of the trainer.
        below: Whether importance sampling is put over the user's own trainer, and not beneath it.
        prepare: What the script does with the trainer before it trains.
    """

    trainer: Callable[[type], type] = lambda base: base
    model: Callable[[], nn.Module] = Classifier
    data: Callable[[], Any] = points
    settings: dict = field(default_factory=dict)
    given: dict = field(default_factory=dict)
    below: bool = False
    prepare: Callable[[Trainer], Any] = lambda trainer: None


class Gradients(TrainerCallback):
    """Keeps the gradient of every step, and whether it was drawn by importance."""

    trainer = None

    def __init__(self):
        self.found, self.drawn = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(toys.gradient(model.parameters()))
        run = getattr(self.trainer, "_run", None)
        self.drawn.append(run is not None and run.step is not None and run.step.drawn)


class Warnings(logging.Handler):
    """Keeps what the package warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@dataclass
class Outcome:
    """What came of a run."""

    trainer: Trainer
    parameters: torch.Tensor
    gradients: torch.Tensor
    drawn: torch.Tensor
    said: list
    losses: list

    @property
    def steps_on(self):
        return int(self.drawn.sum())


METHODS = {
    "presample": {"tau_threshold": 1.0 + 1e-9, "presample_ratio": 3.0, "importance_kwargs": {"momentum": 0.0}},
    "history": {"importance_method": "history", "importance_kwargs": {"margin": 1.0}},
    "auto": {"importance_method": "auto", "importance_kwargs": {"kappa": 0.05}},
    "off": {"importance_sampling": False},
}


def flat(tensors):
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def make(script, method, folder, **overrides):
    """Make the trainer of a script: the plain one where ``method`` is None."""
    settings = {"per_device_train_batch_size": BATCH, "max_steps": 14, "logging_steps": 7, **script.settings}
    settings = {**settings, "max_grad_norm": 0.0, **overrides}
    args = toys.arguments(folder, **{**settings, "importance_method": "presample", **METHODS[method or "off"]})
    if method is None:
        kind = script.trainer(Trainer)
    elif script.below:
        kind = type("Both", (ImportanceMixin, script.trainer(Trainer)), {})
    else:
        kind = script.trainer(ImportanceTrainer)
    given = {"args": args, "train_dataset": script.data(), **script.given}
    trainer = kind(model=script.model(), **given)
    trainer.remove_callback(PrinterCallback)
    script.prepare(trainer)
    return trainer


def run(script, method, **overrides):
    """Run a script, by the plain Trainer where ``method`` is None."""
    logger, warned, gradients = logging.getLogger("hf_importance"), Warnings(), Gradients()
    logger.addHandler(warned)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(script, method, folder, **overrides)
            gradients.trainer = trainer
            trainer.add_callback(gradients)
            trainer.train()
    finally:
        logger.removeHandler(warned)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = torch.stack(gradients.found)
    drawn = torch.tensor(gradients.drawn)
    return Outcome(trainer, flat(trainer.model.parameters()), found, drawn, warned.said, losses)


# ---- The law ----


def same(ours, plain):
    """Whether two runs trained the same, to the last bit."""
    assert torch.equal(ours.parameters.nan_to_num(7.0), plain.parameters.nan_to_num(7.0))
    assert torch.equal(ours.gradients.nan_to_num(7.0), plain.gradients.nan_to_num(7.0))
    assert repr(ours.losses) == repr(plain.losses)
    assert ours.steps_on == 0


def check_off(script, reason, methods=("presample", "history"), **overrides):
    """The run is the plain Trainer's, one warning gives the reason, and switched off nothing is said at all."""
    plain = run(script, None, **overrides)
    for method in methods:
        ours = run(script, method, **overrides)
        same(ours, plain)
        (said,) = ours.said
        assert "Importance sampling is off for this run, which goes on as the plain Trainer's" in said
        assert reason in said, said
    check_switched_off(script, plain, **overrides)


def check_switched_off(script, plain=None, **overrides):
    """With ``importance_sampling=False`` the run is the plain Trainer's, and nothing is said."""
    plain = plain or run(script, None, **overrides)
    ours = run(script, "off", **overrides)
    same(ours, plain)
    assert ours.said == []


def full_gradient(script, count=None):
    """Give the plain Trainer's gradient of all examples in one batch: what a uniform step is an estimate of."""
    whole = {"per_device_train_batch_size": count or len(script.data()), "max_steps": 1, "learning_rate": 0.0}
    return run(script, None, **whole, gradient_accumulation_steps=1).gradients[0]


def check_mean(gradients, expected, deviations=5):
    """The mean of some gradients is what is expected, as far as their noise tells."""
    errors = gradients.std(0) / len(gradients) ** 0.5
    off = (gradients.mean(0) - expected).abs()
    assert bool((off <= deviations * errors + 1e-5).all()), f"off by {off}, standard errors {errors}"


def check_on(script, methods=("presample", "history"), expected=None, steps=120, **overrides):
    """Importance sampling goes on, without a warning, and its mean gradient is the plain Trainer's, or as given."""
    if expected is None:
        accumulation = {name: n for name, n in overrides.items() if name == "gradient_accumulation_steps"}
        check_switched_off(script, **accumulation)
        expected = full_gradient(script)
    for method in methods:
        ours = run(script, method, **{"max_steps": steps, "learning_rate": 0.0, "logging_steps": 50, **overrides})
        assert ours.said == [], ours.said
        assert ours.steps_on >= steps // 4, ours.steps_on
        check_mean(ours.gradients[ours.drawn], expected)
