"""Right or off over the space of scripts: what people write, put together at random, beside the plain Trainer.

Either the run is the plain Trainer's to the last bit, and one warning says why; or importance sampling is on, and what
it draws has the plain Trainer's shares of rows and its mean gradient. The learning rate is 0, so that all steps of a
run are draws of one gradient, and each of them is compared.
"""

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import CLASSES, EXAMPLES, RARE, Classifier, Counting, Script, check_mean, points, run, same
from test_right_or_off import (
    DRAWN_LIKE,
    LABELS,
    a_part,
    by_loader,
    by_sampler,
    drawn_gradient,
    entropy,
    evenly,
    weighted,
)
from torch.utils.data import SequentialSampler
from transformers import default_data_collator

STEPS = 50  # more than an epoch, with batches of two as well
COUNT = 300  # of scripts


class Plainly(Classifier):
    """Its loss is a mean over the micro-batch."""

    def forward(self, x, labels=None, target=None, row=None, extra=None, note=None):
        return super().forward(x, labels if target is None else target)


class Counts(Counting):
    """Its loss is a mean over the step, where the Trainer counts one."""

    def forward(self, x, labels=None, num_items_in_batch=None, target=None, **kwargs):
        return super().forward(x, labels if target is None else target, num_items_in_batch)


# ---- The space ----


@dataclass(frozen=True)
class Composition:
    """One script, by its parts."""

    override: str
    below: bool
    sampler: str
    own_loader: bool
    collator: str
    label: str
    accumulation: int
    batch_size: int
    workers: int
    model: type
    weights: bool
    method: str
    sampling: bool
    seed: int

    @property
    def weighs(self):
        """Whether the loss has class weights."""
        return self.weights or self.override == "class weights"

    @property
    def right(self):
        """Whether importance sampling may be on; None: it depends on what the sampler chooses to do."""
        wrong_loss = self.override == "added term" or self.label != "labels"
        # Of several micro-batches class weights are off; of one they are learnt, where the script lets them.
        wrong_loss |= self.weighs and self.accumulation > 1
        # How a mean over each micro-batch becomes one over the step is left to who overrides the loss.
        left = self.accumulation > 1 and self.override != "none" and self.model is Plainly
        # What the user's loader makes is known by its examples only where it is made of what we give it.
        unknown = self.sampler != "default" or (self.own_loader and not self.below)
        ordered = self.sampler == "sequential" or (unknown and self.method == "history")
        if not self.sampling or wrong_loss or left or ordered:
            return False
        if self.collator in ("whole", "ragged"):  # rows cannot be taken out of these batches, but whole ones can
            found = {"presample": False, "history": True, "auto": None}[self.method]
            return None if self.weighs and found else found
        return None if self.weighs else True


COMPOSITIONS = st.builds(
    Composition,
    override=st.sampled_from([*["none", "pass-through"] * 3, "class weights", "added term"]),
    below=st.booleans(),
    sampler=st.sampled_from(["default", "default", "default", "weighted", "subset", "sequential"]),
    own_loader=st.booleans(),
    collator=st.sampled_from(["plain", "extra", "extra", "whole", "ragged"]),
    label=st.sampled_from(["labels"] * 7 + ["target"]),
    accumulation=st.integers(1, 3),
    batch_size=st.sampled_from([2, 4, 8]),
    workers=st.sampled_from([0, 0, 0, 1]),
    model=st.sampled_from([Plainly, Counts]),
    weights=st.sampled_from([False] * 7 + [True]),
    method=st.sampled_from(["presample", "history", "auto"]),
    sampling=st.sampled_from([True] * 7 + [False]),
    seed=st.integers(0, 2**31 - 1),
)


# ---- The parts ----


def overriding(base, override):
    """The user's trainer."""

    class PassesThrough(base):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    class Weighs(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["x"])
            loss = weighted(outputs["logits"], inputs.get("labels", inputs.get("target")))
            return (loss, outputs) if return_outputs else loss

    class Adds(base):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = entropy(self, model, loss, outputs["logits"], None)
            return (loss, outputs) if return_outputs else loss

    return {"none": base, "pass-through": PassesThrough, "class weights": Weighs, "added term": Adds}[override]


def everything(data):
    return torch.utils.data.RandomSampler(data)


SAMPLERS = {"default": everything, "weighted": evenly, "subset": a_part, "sequential": SequentialSampler}


def collator(kind):
    """The user's collator."""

    def collate(rows):
        batch, total = default_data_collator(rows), sum(int(row["row"]) for row in rows)
        more = {
            "plain": {},
            "extra": {"extra": torch.ones(len(rows), 2)},
            "whole": {"note": float(total)},
            "ragged": {"extra": torch.ones(len(rows), 2 + total % 3)},
        }
        return {**batch, **more[kind]}

    return collate


def data(label):
    rows = points(row=lambda labels: torch.arange(len(labels)))
    return [{label if name == "labels" else name: value for name, value in row.items()} for row in rows]


def keep_shares(trainer):
    """Keep the share that each row has of each optimizer step, in ``trainer.shares``."""
    compute, trainer.shares = trainer.compute_loss, {}

    def keeping(model, inputs, *args, **kwargs):
        run = getattr(trainer, "_run", None)
        weights, _ = (None, None) if run is None or run.step is None else run.step.current
        shares = torch.ones(len(inputs["row"])) if weights is None else weights / float(trainer._objective.step_items)
        step = trainer.shares.setdefault(trainer.state.global_step, torch.zeros(EXAMPLES))
        step.index_add_(0, inputs["row"], shares)
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = keeping


def script(composition):
    """Put it together."""
    one = composition

    def trainer(base):
        if one.own_loader:
            base = by_loader(SAMPLERS[one.sampler])(base)
        elif one.sampler != "default":
            base = by_sampler(SAMPLERS[one.sampler])(base)
        return overriding(base, one.override)

    given = {
        "per_device_train_batch_size": one.batch_size,
        "gradient_accumulation_steps": one.accumulation,
        "dataloader_num_workers": one.workers,
        "remove_unused_columns": False,
        "label_names": [one.label],
        "learning_rate": 0.0,
        "max_steps": STEPS,
        "logging_steps": 16,
        "seed": one.seed,
    }
    return Script(
        trainer,
        lambda: one.model(RARE if one.weights else None),
        lambda: data(one.label),
        settings=given,
        given={"data_collator": collator(one.collator)},
        below=one.below,
        prepare=keep_shares,
    )


# ---- The law ----


def check_draws(ours, composition, shares):
    """What was drawn is what the user's loader may give, with the mean gradient of that."""
    wanted = wanted_shares(composition.sampler)
    if composition.weighs:
        check_mean(ours.gradients[ours.drawn], weighed_gradient(composition, wanted), deviations=8)
        return
    rows = torch.stack([ours.trainer.shares[step] for step in ours.drawn.nonzero().flatten().tolist()])
    assert (rows[:, wanted == 0] == 0).all(), "a row was trained on that the loader never gives"
    shares[composition.sampler].append(torch.zeros(len(rows), CLASSES).index_add_(1, LABELS, rows))
    # The noise of few steps is itself known by halves, and there are many compositions.
    check_mean(ours.gradients[ours.drawn], drawn_gradient(wanted), deviations=8)


def weighed_gradient(composition, wanted):
    """Give the mean gradient of the plain Trainer's batches, by very many of them."""
    generator, size = torch.Generator().manual_seed(1), composition.batch_size
    again = composition.sampler == "weighted"
    order = torch.stack([torch.multinomial(wanted, size, again, generator=generator) for _ in range(5000)])
    weight = RARE[LABELS[order]]
    counting = composition.override != "class weights" and composition.model is Counts
    given = (weight / (size if counting else weight.sum(1, keepdim=True))).flatten()
    counted = torch.zeros(EXAMPLES).index_add(0, order.flatten(), given) / len(order)
    return drawn_gradient(counted)


def wanted_shares(sampler):
    """Give how often each row comes."""
    if sampler == "default":
        return torch.full((EXAMPLES,), 1 / EXAMPLES)
    return DRAWN_LIKE[{"weighted": "evenly", "subset": "a part"}[sampler]].float()


def check(composition, shares):
    """Hold one script to the law, and keep the share that each class has of each step that was drawn."""
    ours = run(script(composition), composition.method if composition.sampling else "off")
    expected = composition.right
    assert len(ours.said) == (composition.sampling if expected is False else bool(ours.said)), ours.said
    if expected is True:
        assert ours.said == []
    if ours.steps_on >= 12:
        assert expected is not False
        check_draws(ours, composition, shares)
    elif ours.steps_on == 0:
        same(ours, run(script(composition), None))
    else:
        assert expected is not False  # it went on at the end, or for a while


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_any_script_is_right_or_off():
    shares = defaultdict(list)

    @settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
    @given(COMPOSITIONS)
    def right_or_off(composition):
        check(composition, shares)

    right_or_off()
    # An example that is easy is hardly ever drawn, and then counts for many: one run is too short to tell its share.
    assert shares.keys() == {"default", "weighted", "subset"}
    for sampler, found in shares.items():
        wanted = torch.zeros(CLASSES).index_add_(0, LABELS, wanted_shares(sampler))
        check_mean(torch.cat(found), wanted)
