"""With accumulation, what a step keeps is gathered in as few micro-batches as hold it; the others are left out."""

import json
import math
from dataclasses import replace

import pytest
import torch
import toys
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainerCallback

from hf_importance import ImportanceTrainer, Pool, Sampler, Visits, resample
from hf_importance.batches.entries import batch_size_of
from hf_importance.batches.visits import Order
from hf_importance.theory.costs import plan
from hf_importance.theory.variance import WithReplacement

ACCUMULATION = 4
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Quarter(Sampler):
    """Keeps of two batches a quarter of one."""

    def pool(self):
        return Pool(2 * self.run.batch_size, self.run.batch_size / 4)

    def keep(self, pool):
        return resample(pool.scores, pool.kept, "systematic", pool.generator)


class Named(Sampler):
    """Names a quarter of each batch, for two optimizer steps at a time."""

    remembers = True
    share = 1 / 4

    def visits(self):
        run = self.run
        micro = min(2 * run.accumulation, run.micro_batches_left)
        size = run.batch_size * self.share
        generator = run.generator(run.draws(), 4)
        index = torch.randperm(run.examples, generator=generator)[: math.floor(micro * size) * run.ranks]
        weights = 0.5 + torch.rand(len(index), generator=generator)
        return Visits(index, weights / weights.mean(), micro, batch_size=size)


class TooMany(Named):
    def visits(self):
        found = super().visits()
        return replace(found, micro_batches=self.run.micro_batches_left + 1)


class OneByOne(ImportanceTrainer):
    """Trains on every micro-batch."""

    def _begin_run(self):
        super()._begin_run()
        run = self._run
        run.feed.gathered = 1
        run.facts = run.pools.facts = self.sampler.run = replace(run.facts, gathered=1)


class OwnStep(ImportanceTrainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class Substeps(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_substep_end(self, *args, **kwargs):
        self.count += 1


def trained(kind, model, data, tmp_path, sampler=Quarter, **settings):
    """Train, and give the trainer, with the sizes of the batches that were trained on in each optimizer step."""
    steps = [[]]

    def note(module, args, kwargs, output):
        if module.training:
            steps[-1].append(batch_size_of(kwargs))

    model.register_forward_hook(note, with_kwargs=True)

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            steps.append([])

    args = toys.arguments(tmp_path, gradient_accumulation_steps=ACCUMULATION, **{"max_steps": 6, **settings})
    more = {} if kind is Trainer else {"sampler": sampler()}
    trainer = kind(model=model, args=args, train_dataset=data, callbacks=[Ends(), Substeps()], **more)
    trainer.train()
    return trainer, steps[:-1]


def tagger():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForTokenClassification(BertConfig(vocab_size=99, num_labels=4, **NO_DROPOUT, **sizes))


def tagged():
    """Texts of 1 to 6 tokens, each with as many labels: so the items of a batch differ."""
    rows = []
    for i in range(128):
        length = 1 + i % 6
        ids = [(7 * i + 3 * j) % 90 for j in range(length)] + [0] * (6 - length)
        labels = [(i + j) % 4 for j in range(length)] + [-100] * (6 - length)
        rows.append({"input_ids": ids, "attention_mask": [1] * length + [0] * (6 - length), "labels": labels})
    return Dataset.from_list(rows)


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_kept_examples_are_gathered_and_the_other_micro_batches_cost_no_pass(tmp_path, digits):
    data = digits.select(range(256))
    trainer, steps = trained(ImportanceTrainer, toys.vit(), data, tmp_path)
    b = trainer._run.facts.batch_size
    assert trainer._run.facts.gathered == ACCUMULATION
    first, *others = steps
    assert first == [b] * ACCUMULATION and others == [[b]] * 5
    plain, _ = trained(Trainer, toys.vit(), data, tmp_path)
    assert trainer.state.global_step == plain.state.global_step and trainer.state.epoch == plain.state.epoch
    counts = [next(c.count for c in t.callback_handler.callbacks if isinstance(c, Substeps)) for t in (trainer, plain)]
    assert counts[0] == counts[1] == 6 * (ACCUMULATION - 1)


@pytest.mark.parametrize("sampler", [Quarter, Named])
@pytest.mark.parametrize("task", ["images", "texts", "tokens"])
def test_gathered_it_is_the_same_step(tmp_path, digits, task, sampler):
    # One by one each batch holds a quarter of what is kept; gathered, one holds all.
    make, data = {
        "images": (toys.vit, digits.select(range(256))),
        "texts": (toys.bert, toys.sentences()),
        "tokens": (tagger, tagged()),
    }[task]
    settings = {"max_steps": 4, "logging_steps": 1, "optim": "sgd", "sampler": sampler}
    together, steps = trained(ImportanceTrainer, make(), data, tmp_path, **settings)
    apart, single = trained(OneByOne, make(), data, tmp_path, **settings)
    assert [len(step) for step in steps[1:]] == [1] * 3 and [len(step) for step in single[1:]] == [ACCUMULATION] * 3
    assert [sum(step) for step in steps] == [sum(step) for step in single]
    torch.testing.assert_close(parameters(together), parameters(apart), rtol=1e-4, atol=1e-6)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (together, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("sampler", [Quarter, Named])
def test_a_training_step_of_ones_own_meets_every_micro_batch(tmp_path, digits, sampler):
    trainer, steps = trained(OwnStep, toys.vit(), digits.select(range(256)), tmp_path, sampler)
    assert trainer._run.facts.gathered == 1 and all(len(step) == ACCUMULATION for step in steps)


def test_the_last_step_of_an_epoch_is_gathered_too(tmp_path, digits):
    # 8 batches and a half: the third step of an epoch has one whole micro-batch, or less, to stand for.
    data = digits.select(range(2 * ACCUMULATION * 16 + 24))
    trainer, steps = trained(
        ImportanceTrainer, toys.vit(), data, tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=16
    )
    assert trainer.state.global_step == 6
    assert steps[1:] == [[16], [6], [16], [16], [6]]  # a quarter of 16 + 8


@pytest.mark.parametrize("workers", [0, 2])
def test_visits_that_are_gathered_resume_exactly(tmp_path, workers):
    runs = []
    for name, resume in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        settings = {"gradient_accumulation_steps": ACCUMULATION, "dataloader_num_workers": workers}
        args = toys.arguments(tmp_path / name, max_steps=7, save_strategy="steps", save_steps=1, **settings)
        trainer = ImportanceTrainer(
            model=toys.bert(0.1), args=args, train_dataset=toys.sentences(328), sampler=Named()
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        runs.append(trainer)
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    feed = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]["feed"]
    assert feed["visits"] is not None and feed["visited"] == ACCUMULATION  # in the middle of them
    assert torch.equal(parameters(runs[0]), parameters(runs[1]))


def test_visits_end_with_the_epoch(tmp_path, digits):
    with pytest.raises(ValueError, match="TooMany names visits for 5 micro-batches, and the epoch has 4 left"):
        trained(ImportanceTrainer, toys.vit(), digits.select(range(128)), tmp_path, TooMany)


@given(
    batch_size=st.floats(1, 70),
    length=st.integers(1, 13),
    together=st.integers(1, 5),
    whole=st.integers(1, 64),
    ranks=st.integers(1, 3),
)
def test_each_step_of_an_order_keeps_its_examples_however_they_are_gathered(
    batch_size, length, together, whole, ranks
):
    nothing = torch.empty(0)
    apart = Order(nothing, nothing, batch_size, length, 0)
    gathered = replace(apart, together=together, whole=whole)
    for first in range(0, length, together):
        micro, rows = range(first, min(first + together, length)), {}
        for order in (apart, gathered):
            for rank in range(ranks):
                of_each = [range(10_000)[order.rows(one, rank, ranks)] for one in micro]
                rows[order, rank] = [row for part in of_each for row in part]
                assert [len(part) == 0 for part in of_each] == [order.left_out(one) for one in micro]
                assert len({len(range(10_000)[order.rows(micro[-1], r, ranks)]) for r in range(ranks)}) == 1
        assert all(rows[apart, rank] == rows[gathered, rank] for rank in range(ranks))
        sizes = [len(range(10_000)[gathered.rows(one, 0, ranks)]) for one in micro]
        filled = min(-(-sum(sizes) // whole), len(micro)) if together > 1 else len(micro)
        assert not any(sizes[: len(micro) - filled]) and all(sizes[len(micro) - filled :])
        assert filled == len(micro) or max(sizes) <= min(whole, min(s for s in sizes if s) + 1)


def test_a_micro_batch_that_is_left_out_has_no_rows(tmp_path, digits):
    seen = []

    class Sees(ImportanceTrainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            seen.append([len(batch["labels"]) for batch in batches])
            assert all(batch.keys() == batches[-1].keys() for batch in batches)
            return batches, items

    trained(Sees, toys.vit(), digits.select(range(256)), tmp_path, max_steps=2, include_num_input_tokens_seen="all")
    assert seen[1][:-1] == [0] * (ACCUMULATION - 1) and seen[1][-1] == seen[0][0]


@settings(max_examples=200)
@given(
    batch_size=st.integers(1, 64),
    gathered=st.integers(1, 8),
    smallest=st.integers(1, 64),
    tau=st.floats(1.5, 6),
    kappa=st.floats(0.02, 0.5),
    budget=st.sampled_from(["constant_variance", "constant_time", "variance"]),
)
def test_every_batch_that_is_trained_on_holds_the_fewest(batch_size, gathered, smallest, tau, kappa, budget):
    factor = WithReplacement(tau)
    found = plan(budget, batch_size, factor, kappa, smallest=smallest, gathered=gathered)
    total = found.kept * gathered
    assert total == pytest.approx(round(total)) and 1 <= round(total) <= batch_size * gathered
    batches = math.ceil(total / batch_size - 1e-9)
    assert total / batches >= min(smallest, batch_size) - 1e-9


def test_a_bound_from_below_makes_the_pool_smaller():
    factor = WithReplacement(3.0)
    free = plan("constant_variance", 32, factor, 0.1)
    bound = plan("constant_variance", 32, factor, 0.1, smallest=16)
    assert free.kept < 16 == bound.kept and bound.pool < free.pool
    # Still no noisier than a uniform step, and one example less in the pool would do no longer.
    assert 32 / bound.pool * float(factor(16 / bound.pool)) <= 1
    assert 32 / (bound.pool - 1) * float(factor(16 / (bound.pool - 1))) > 1


class One(Sampler):
    """Keeps one row, whatever is asked for."""

    def pool(self):
        return Pool(2 * self.run.batch_size, self.run.batch_size)

    def keep(self, pool):
        return pool.scores.argmax()[None], torch.ones(1)


@pytest.mark.parametrize("kind", [ImportanceTrainer, OneByOne])
def test_rows_that_fill_up_batches_leave_the_loss_alone(tmp_path, digits, kind):
    args = toys.arguments(
        tmp_path, gradient_accumulation_steps=ACCUMULATION, max_steps=3, logging_steps=1, optim="sgd"
    )
    trainer = kind(model=toys.vit(), args=args, train_dataset=digits.select(range(256)), sampler=One())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] == pytest.approx(math.log(10), rel=0.3)  # of one hard example; a quarter of it if diluted
