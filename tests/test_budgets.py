"""Fewer examples a step leave the gradient what it was; which are scored and kept follows the cost rule."""

import functools
import itertools
import logging
import math

import pytest
import reference
import torch
import toys

from hf_importance import ImportanceTrainer
from hf_importance.batches.pool import Padding, PooledBatches, stand_for
from hf_importance.heads.tasks import ClassificationHead
from hf_importance.theory.costs import plan
from hf_importance.theory.sampling import inclusion_probabilities
from hf_importance.theory.variance import WithoutReplacement, inverse_moments


class Sizes(ImportanceTrainer):
    """Keeps the size of every batch trained on, and of every pool where each step is logged."""

    def __init__(self, *args, **kwargs):
        self.kept = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.kept.append(len(inputs["labels"]))
        return super().training_step(model, inputs, *args, **kwargs)

    @property
    def pools(self):
        scored = [e["importance/examples_scored"] for e in self.state.log_history if "loss" in e]
        assert len(scored) == self.state.global_step
        return [after - before for before, after in itertools.pairwise([0, *scored]) if after > before]


def skewed(outputs, labels):
    """One example in 8 has a score: tau = sqrt(8)."""
    return (torch.arange(len(labels)) % 8 == 0).float()


@pytest.mark.parametrize("filled", [1, 2], ids=lambda n: f"{n}_batches")
def test_the_gradient_of_a_smaller_batch_is_unbiased_over_every_outcome(tmp_path, filled):
    # Two micro-batches of one step, own batches of 2 and 1 examples and a pool of 6; 2 are kept, gathered in one batch
    # or trained on one by one. In float64, over all orders and offsets.
    model = toys.bert().double()
    trainer = ImportanceTrainer(model=model, args=toys.arguments(tmp_path), train_dataset=toys.sentences())
    data = toys.sentences(seed=3)
    pool = PooledBatches([data[0:2], data[2:3], data[3:5], data[5:6]], Padding())
    own, share, kept = 3, 2 / 3, 2
    head = ClassificationHead("single_label_classification", 4, 0.0)

    def gradient(batches, items):
        trainer._objective.step_items = items
        model.zero_grad()
        for batch in batches:
            trainer.compute_loss(model.train(), batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    every = pool.take(torch.arange(len(pool)))[0]
    scores = head.upper_bound(model(**{k: v for k, v in every.items() if k != "labels"}), every).double()
    pi = inclusion_probabilities(scores, kept)

    @functools.cache
    def of(drawn):
        rows = torch.tensor(drawn)
        weights, scale = kept / (len(pool) * pi), share * own / kept
        batches = [stand_for(pool, part, weights[part], scale)[0] for part in rows.tensor_split(filled)]
        return gradient(batches, own * share)

    found = 0.0
    for order in itertools.permutations(range(len(pool))):
        for p, drawn in reference.systematic_outcomes(pi.tolist(), list(order)):
            found = found + p / math.factorial(len(pool)) * of(tuple(sorted(drawn)))
    # A uniform step of 3 examples: the mean over the pool, as often as the own batches have examples.
    uniform, _ = stand_for(pool, torch.arange(len(pool)), torch.ones(len(pool)), scale=own / len(pool))
    torch.testing.assert_close(found, gradient([uniform], float(own)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("budget", ["variance", "constant_variance", "constant_time"])
@pytest.mark.parametrize("ratio", [3.0, 2.5, "auto"])
def test_pool_and_batch_are_what_the_rule_says(tmp_path, digits, budget, ratio):
    settings = {"importance_budget": budget, "presample_ratio": ratio, "momentum": 0.9, "kappa": 0.1}
    args = toys.always_on(tmp_path, max_steps=8, logging_steps=1, **settings)
    data = digits.select(range(128))
    trainer = Sizes(model=toys.vit(), args=args, train_dataset=data, compute_score_func=skewed)
    trainer.train()
    # Step 1 is uniform, and all that is known after it are its scores.
    assert trainer.kept[0] == 16
    factor = WithoutReplacement(0.9)
    factor.average(inverse_moments(skewed(None, torch.ones(16))).tolist())
    expected = plan(budget, 16, factor, 0.1, None if ratio == "auto" else ratio, 1.1, unit=4, largest=128)
    assert (trainer.pools[0], trainer.kept[1]) == (expected.pool, expected.kept)
    if budget == "variance":
        assert set(trainer.kept) == {16}
    else:
        assert trainer.kept[-1] < 16
    scored, trained = sum(trainer.pools), sum(trainer.kept)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert (logged["importance/examples_scored"], logged["importance/examples_trained"]) == (scored, trained)
    assert logged["importance/kappa"] == 0.1


def test_pool_and_batch_follow_the_scores(tmp_path, digits):
    settings = {"presample_ratio": "auto", "importance_budget": "constant_variance", "momentum": 0.5}
    args = toys.always_on(tmp_path, logging_steps=1, **settings)

    def harder(outputs, labels):
        """Every other example, later one in 8."""
        every = 2 if trainer.state.global_step < 3 else 8
        return (torch.arange(len(labels)) % every == 0).float()

    trainer = Sizes(model=toys.vit(), args=args, train_dataset=digits.select(range(128)), compute_score_func=harder)
    trainer.train()
    # More to win: fewer are kept.
    assert trainer.kept[1] > trainer.kept[-1]
    assert all((pool - 16) % 4 == 0 for pool in trainer.pools)


def test_a_time_that_cannot_be_kept_is_said_once(tmp_path, digits, caplog):
    # At kappa = 1/3, assumed until it is measured, scoring 48 examples takes as long as training on all 16.
    args = toys.always_on(tmp_path, importance_budget="constant_time", max_steps=4)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)), compute_score_func=skewed)
    assert sum("'constant_time' cannot be kept" in record.getMessage() for record in caplog.records) == 1


def test_a_stream_completes_the_pool_in_whole_batches(tmp_path, digits):
    args = toys.always_on(tmp_path, presample_ratio="auto", max_steps=3, logging_steps=1)
    stream = digits.select(range(256)).to_iterable_dataset()
    trainer = Sizes(model=toys.vit(), args=args, train_dataset=stream, compute_score_func=skewed)
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(pool % 16 == 0 and pool > 16 for pool in trainer.pools[-2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_with_a_pool_that_changes_are_the_same_run(tmp_path, digits, workers):
    def parameters():
        args = toys.always_on(
            tmp_path, presample_ratio="auto", momentum=0.7, kappa=0.2, dataloader_num_workers=workers, max_steps=5
        )
        trainer = ImportanceTrainer(
            model=toys.vit(), args=args, train_dataset=toys.Augmented(digits.select(range(128)))
        )
        trainer.train()
        return torch.cat([p.flatten() for p in trainer.model.parameters()])

    assert torch.equal(parameters(), parameters())


@pytest.mark.parametrize(("policy", "fewest"), [("untouched", 16), ("frozen", 1)])
def test_batch_norm_never_normalises_by_a_handful(tmp_path, digits, policy, fewest):
    data = digits.select(range(128)).map(
        lambda e: {"pixel_values": torch.nn.functional.interpolate(e["pixel_values"][None], 8)[0]}
    )
    settings = {"presample_ratio": "auto", "importance_budget": "constant_variance", "kappa": 0.01}
    args = toys.always_on(tmp_path, batch_norm=policy, **settings)
    one = lambda outputs, labels: (torch.arange(len(labels)) == 0).float()  # noqa: E731
    trainer = Sizes(model=toys.resnet(), args=args, train_dataset=data, compute_score_func=one)
    trainer.train()
    assert min(trainer.kept) in (fewest, fewest + 1)  # the margin is rounded up
