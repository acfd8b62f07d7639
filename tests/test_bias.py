"""A bias on purpose: weights to a power, rescaled so that a step's summed score stays, or to a mean of 1."""

import itertools
import math

import pytest
import reference
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_importance import Auto, History, ImportanceTrainer, Presample
from hf_importance.batches.entries import WEIGHTS
from hf_importance.theory.sampling import bias_weights

SCORES = [0.5, 1.0, 3.0, 8.0]


def uneven(outputs, labels):
    return 1.0 + 9.0 * (labels == 0).float()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_it_is_the_law_of_the_authors(weights, exponent):
    # With replacement weights are inverse to the scores, whatever the scale of these.
    slow = reference.biased_weights(weights, [7.0 / w for w in weights], exponent)
    found = bias_weights(torch.tensor(weights, dtype=torch.float64), exponent)
    torch.testing.assert_close(found.tolist(), slow, rtol=1e-9, atol=0)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_over_all_draws_the_length_stays_and_the_direction_does_not(exponent):
    # All 256 outcomes of four draws: the mean of w Ĝ is that of the pool in each, the mean of w alone is not.
    probabilities, mean = [s / sum(SCORES) for s in SCORES], sum(SCORES) / 4
    counted = 0.0
    for chance, drawn in reference.multinomial_outcomes(probabilities, 4):
        weights = bias_weights(torch.tensor([1 / (4 * probabilities[i]) for i in drawn]).double(), exponent).tolist()
        assert sum(w * SCORES[i] for w, i in zip(weights, drawn, strict=True)) / 4 == pytest.approx(mean)
        counted += chance * sum(weights) / 4
    assert (counted == pytest.approx(1.0)) is (exponent == 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.sampled_from([0.0, 0.5, 1.0]))
def test_normalised_they_are_those_of_a_weighted_mean(weights, exponent):
    found = bias_weights(torch.tensor(weights, dtype=torch.float64), exponent, normalise=True)
    assert found.tolist() == pytest.approx(reference.normalised_weights(weights, exponent), rel=1e-12)
    assert float(found.mean()) == pytest.approx(1.0)


def test_normalised_the_bias_is_of_order_one_over_n():
    # All outcomes of n draws. What examples have in common is exact in each; of the rest n times the bias tends to
    # -E[w² (x - mean x)], as it does for any ratio of means.
    scores, values = [1.0, 1.5, 2.0, 4.0], [2.0, -1.0, 0.5, 3.0]
    probabilities, true = [s / sum(scores) for s in scores], sum(values) / 4
    limit = -sum((1 / (4 * p)) ** 2 * p * (x - true) for p, x in zip(probabilities, values, strict=True))
    for size, within in ((8, 0.4), (32, 0.1)):
        expected = []
        for chance, drawn in counted_outcomes(probabilities, size):
            weights = torch.tensor([1 / (4 * probabilities[i]) for i in drawn]).double()
            found = bias_weights(weights, 1.0, normalise=True).tolist()
            assert sum(found) / size == pytest.approx(1.0)
            expected.append(chance * sum(w * values[i] for w, i in zip(found, drawn, strict=True)) / size)
        assert size * (math.fsum(expected) - true) == pytest.approx(limit, rel=within)


def counted_outcomes(probabilities, size):
    """Every outcome of draws with replacement, their order left aside."""
    for drawn in itertools.combinations_with_replacement(range(len(probabilities)), size):
        counts = [drawn.count(i) for i in range(len(probabilities))]
        ways = math.factorial(size) // math.prod(math.factorial(count) for count in counts)
        yield ways * math.prod(p**count for p, count in zip(probabilities, counts, strict=True)), drawn


class Look(ImportanceTrainer):
    """Keeps the weights of every step, by micro-batches."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.__dict__.setdefault("weights", []).append([batch.get(WEIGHTS) for batch in toys.handed(self, batches)])
        return batches, items


def train(tmp_path, sampler=None, **overrides):
    trainer = Look(
        model=toys.bert(),
        args=toys.always_on(tmp_path, **{"learning_rate": 0.0, "logging_steps": 1, **overrides}),
        train_dataset=toys.sentences(256),
        compute_score_func=uneven,
        sampler=sampler,
    )
    trainer.train()
    return trainer


BIASED = pytest.mark.parametrize(
    "biased", [{"bias": 0.5}, {"normalise": True}, {"bias": 0.5, "normalise": True}, {"bias": 0.0, "normalise": True}]
)


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
@pytest.mark.parametrize("accumulation", [1, 2])
@BIASED
def test_it_acts_on_every_step_of_pools_and_on_nothing_that_is_measured(tmp_path, resampling, accumulation, biased):
    # Nothing is learnt, so both runs draw the same examples.
    settings = {"resampling": resampling, "gradient_accumulation_steps": accumulation}
    plain = train(tmp_path / "plain", **settings)
    other = train(tmp_path / "biased", **biased, **settings)
    drawn = [pair for pair in zip(plain.weights, other.weights, strict=True) if pair[0][0] is not None]
    assert len(drawn) > 5
    for own, found in drawn:
        expected = bias_weights(torch.cat(own).double(), biased.get("bias", 1.0), biased.get("normalise", False))
        torch.testing.assert_close(torch.cat(found), expected.float(), rtol=1e-5, atol=0)
    assert any(not torch.allclose(torch.cat(own), torch.cat(found)) for own, found in drawn)
    for key in ("tau", "gain", "examples_trained", "switches"):
        entries = ([e for e in t.state.log_history if "loss" in e] for t in (plain, other))
        ours, theirs = ([e.get("importance/" + key, 0.0) for e in log] for log in entries)
        assert ours == pytest.approx(theirs, rel=1e-5), key


class Noting(History):
    """Keeps what it names."""

    def visits(self):
        found = super().visits()
        if found is not None and not found.uniform:
            self.__dict__.setdefault("named", []).append(found)
        return found


@pytest.mark.parametrize("budget", ["variance", "constant_variance"])
@pytest.mark.parametrize("accumulation", [1, 3])
@BIASED
def test_it_acts_on_every_step_of_visits_which_represent_what_they_did(tmp_path, budget, accumulation, biased):
    sampler = Noting(budget, **biased)
    trainer = train(tmp_path, sampler, max_steps=70 // accumulation, gradient_accumulation_steps=accumulation)
    trained = [torch.cat(weights) for weights in trainer.weights if weights[0] is not None]
    assert len(sampler.named) > 1
    for visits in sampler.named:
        ends = [math.floor(micro * visits.batch_size) for micro in range(visits.micro_batches + 1)]
        steps = list(zip(ends[::accumulation], [*ends[accumulation::accumulation], ends[-1]], strict=False))
        for start, end in steps:
            own, found = visits.represents[start:end].double(), visits.weights[start:end]
            expected = bias_weights(own, biased.get("bias", 1.0), biased.get("normalise", False))
            torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
        assert max(end - start for start, end in steps) <= 16 * accumulation
    # They are what is trained with, up to where the run ended.
    named = torch.cat([visits.weights for visits in sampler.named])
    assert torch.cat(trained).tolist() == named[: len(torch.cat(trained))].tolist()


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_it_lies_between_none_and_unbiased(tmp_path, value):
    message = rf"bias must be a number in \[0, 1\], but it is {value}"
    for kind in (Presample, History):
        with pytest.raises(ValueError, match=message):
            kind(bias=value)
    for method in ("presample", "history", "auto"):
        args = toys.arguments(tmp_path, importance_method=method, bias=value)
        with pytest.raises(ValueError, match=message):
            ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(64))


def test_both_methods_that_auto_chooses_from_have_it(tmp_path):
    args = toys.arguments(tmp_path, importance_method="auto", bias=0.5, normalise=True)
    sampler = ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(64)).sampler
    assert isinstance(sampler, Auto) and sampler.fresh.bias == sampler.remembered.bias == 0.5
    assert sampler.fresh.normalise and sampler.remembered.normalise


@pytest.mark.parametrize("biased", [{"bias": 0.0}, {"bias": 0.5, "normalise": True}])
def test_it_ends_where_it_is_told_to(tmp_path, biased):
    # Nothing is learnt, so all three runs draw the same examples; 8 steps, of which the first 5 are within 0.6.
    unbiased = {name: value for name, value in biased.items() if name != "bias"}
    before, part, after = (
        train(tmp_path / name, **settings).weights
        for name, settings in (("before", biased), ("part", {**biased, "bias_until": 0.6}), ("after", unbiased))
    )
    assert len(part) == 8 and all(weights[0] is not None for weights in part[1:])
    for step in range(1, 8):
        expected = before if step < 5 else after
        assert part[step][0].tolist() == expected[step][0].tolist()
    assert part[4][0].tolist() != after[4][0].tolist() and part[5][0].tolist() != before[5][0].tolist()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_ends_there_within_visits_too(tmp_path, accumulation):
    steps = 72 // accumulation
    sampler = Noting("variance", bias=0.5, bias_until=0.8)
    trainer = train(tmp_path, sampler, max_steps=steps, gradient_accumulation_steps=accumulation)
    own = torch.cat([visits.represents for visits in sampler.named])
    place = kept = 0
    for step, weights in enumerate(trainer.weights):
        if weights[0] is None:
            continue
        found = torch.cat(weights)
        unbiased = own[place : place + len(found)]
        place += len(found)
        expected = bias_weights(unbiased.double(), 0.5 if step < 0.8 * steps else 1.0).float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        kept += step >= 0.8 * steps
    assert kept >= 4
