"""The authors' bias: weights to a power, rescaled so that the batch's summed score stays."""

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


class Look(ImportanceTrainer):
    """Keeps the weights of every micro-batch."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        given = [batch.get(WEIGHTS) for batch in toys.handed(self, batches)]
        self.__dict__.setdefault("weights", []).extend(given)
        return batches, items


def train(tmp_path, **overrides):
    settings = {"learning_rate": 0.0, "logging_steps": 1, **overrides}
    trainer = Look(
        model=toys.bert(),
        args=toys.always_on(tmp_path, **settings),
        train_dataset=toys.sentences(256),
        compute_score_func=uneven,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"resampling": "systematic"},
        {"resampling": "multinomial"},
        {"importance_method": "history", "tau_threshold": None, "max_steps": 70},
        {
            "importance_method": "history",
            "tau_threshold": None,
            "max_steps": 70,
            "importance_budget": "constant_variance",
        },
    ],
)
def test_it_acts_on_every_micro_batch_and_on_nothing_that_is_measured(tmp_path, settings):
    # Nothing is learnt, so both runs draw the same examples.
    plain = train(tmp_path / "plain", **settings)
    biased = train(tmp_path / "biased", bias=0.5, **settings)
    drawn = [pair for pair in zip(plain.weights, biased.weights, strict=True) if pair[0] is not None]
    assert len(drawn) > 5
    for own, found in drawn:
        torch.testing.assert_close(found, bias_weights(own.double(), 0.5).float(), rtol=1e-5, atol=0)
    assert any(not torch.allclose(own, found) for own, found in drawn)
    for key in ("tau", "gain", "examples_trained", "switches"):
        entries = ([e for e in t.state.log_history if "loss" in e] for t in (plain, biased))
        ours, theirs = ([e.get("importance/" + key, 0.0) for e in log] for log in entries)
        assert ours == pytest.approx(theirs, rel=1e-5), key


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
    args = toys.arguments(tmp_path, importance_method="auto", bias=0.5)
    sampler = ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(64)).sampler
    assert isinstance(sampler, Auto) and sampler.fresh.bias == sampler.remembered.bias == 0.5
