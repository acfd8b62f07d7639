"""Resampling is unbiased, as an identity over every outcome; systematic draws have a fixed size and no repeats."""

import itertools

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_importance.theory.sampling import effective_sample_size, inclusion_probabilities, resample, systematic_draw

SCORES = [0.1, 2.0, 0.0, 0.7, 5.0]
positive = st.floats(1e-6, 1e6)


def mean_over_outcomes(outcomes, weight_of, values):
    """Expectation of the weighted batch mean over every outcome."""
    return sum(
        probability * sum(weight_of(i) * values[i] for i in drawn) / len(drawn) for probability, drawn in outcomes
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_systematic_is_unbiased_over_all_orders_and_offsets(size):
    # The quantity is zero where the score is: that is what a score of zero says.
    values = [3.0, -1.0, 0.0, 4.0, 2.5]
    pi = inclusion_probabilities(torch.tensor(SCORES), size)
    for order in itertools.permutations(range(len(SCORES))):
        outcomes = reference.systematic_outcomes(pi.tolist(), list(order))
        assert sum(p for p, _ in outcomes) == pytest.approx(1, abs=1e-12)
        found = mean_over_outcomes(outcomes, lambda i: size / (len(SCORES) * float(pi[i])), values)
        assert found == pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_multinomial_is_unbiased_over_all_outcomes(size):
    values = [3.0, -1.0, 0.0, 4.0, 2.5]
    g = [s / sum(SCORES) for s in SCORES]
    outcomes = reference.multinomial_outcomes(g, size)
    found = mean_over_outcomes(outcomes, lambda i: 1 / (len(SCORES) * g[i]) if g[i] else 0.0, values)
    assert found == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_systematic_draw_is_the_reference_for_every_offset():
    pi = inclusion_probabilities(torch.tensor(SCORES), 3)
    for order in itertools.permutations(range(len(SCORES))):
        edge = 0.0
        for probability, drawn in reference.systematic_outcomes(pi.tolist(), list(order)):
            offset = edge + probability / 2
            edge += probability
            assert systematic_draw(pi, torch.tensor(order), offset).tolist() == drawn


def test_resample_weights_are_the_inverse_of_the_probabilities(generator):
    scores = torch.tensor(SCORES)
    index, weight = resample(scores, 3, "systematic", generator)
    pi = torch.tensor(reference.inclusion_probabilities(SCORES, 3), dtype=torch.float64)
    torch.testing.assert_close(weight, 3 / (5 * pi[index]))
    index, weight = resample(scores, 3, "multinomial", generator)
    torch.testing.assert_close(weight, 1 / (5 * scores.double()[index] / scores.double().sum()))


@given(st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_inclusion_probabilities_equal_the_one_by_one_water_filling(scores, data):
    size = data.draw(st.integers(1, len(scores)))
    found = inclusion_probabilities(torch.tensor(scores, dtype=torch.float64), size)
    assert float(found.sum()) == pytest.approx(size, rel=1e-9)
    assert found.tolist() == pytest.approx(reference.inclusion_probabilities(scores, size), rel=1e-6, abs=1e-9)


@given(st.lists(st.one_of(st.just(0.0), positive), min_size=2, max_size=40), st.data())
@settings(deadline=None)
def test_systematic_has_the_asked_size_and_no_repeats(scores, data):
    size = data.draw(st.integers(1, len(scores)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    index, weight = resample(torch.tensor(scores, dtype=torch.float64), size, "systematic", generator)
    assert len(index) == len(weight) == size
    assert len(set(index.tolist())) == size
    assert bool((weight > 0).all())


def test_systematic_inclusion_counts_equal_b_p_where_no_cap_binds(generator):
    scores = torch.rand(30, generator=generator) + 0.5
    expected = 6 * scores.double() / scores.double().sum()
    assert float(expected.max()) < 1  # no cap binds
    draws = 20_000
    counts = torch.zeros(30, dtype=torch.float64)
    for _ in range(draws):
        counts[resample(scores, 6, "systematic", generator)[0]] += 1
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert bool(((counts / draws - expected).abs() < 5 * deviation).all())


def test_systematic_pairs_do_not_depend_on_the_order_of_the_input():
    # Without a random order neighbours would exclude each other. With equal scores every pair must be equally likely.
    generator = torch.Generator().manual_seed(1)
    draws, pairs = 12_000, torch.zeros(6, 6)
    for _ in range(draws):
        index, _ = resample(torch.ones(6), 2, "systematic", generator)
        pairs[index.min(), index.max()] += 1
    rows, columns = torch.triu_indices(6, 6, 1)
    share = pairs[rows, columns] / draws
    assert bool(((share - 1 / 15).abs() < 5 * (1 / 15 * 14 / 15 / draws) ** 0.5).all())


def test_all_zero_scores_are_drawn_uniformly(generator):
    for method in ("systematic", "multinomial"):
        _, weight = resample(torch.zeros(8), 4, method, generator)
        torch.testing.assert_close(weight, torch.ones(4, dtype=torch.float64))


def test_keeping_all_keeps_each_once_with_weight_one(generator):
    index, weight = resample(torch.tensor(SCORES), 5, "systematic", generator)
    assert sorted(index.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(weight, torch.ones(5, dtype=torch.float64))


def test_scores_of_any_scale_give_the_same_draw():
    draws = [
        resample(torch.tensor(SCORES, dtype=torch.float64) * scale, 3, "systematic", torch.Generator().manual_seed(3))
        for scale in (1e-300, 1.0, 1e300)
    ]
    for index, weight in draws[1:]:
        assert index.tolist() == draws[0][0].tolist()
        torch.testing.assert_close(weight, draws[0][1])


def test_the_global_random_stream_is_left_alone(generator):
    before = torch.get_rng_state()
    for method in ("systematic", "multinomial"):
        resample(torch.tensor(SCORES), 2, method, generator)
    assert torch.equal(before, torch.get_rng_state())


def test_effective_sample_size_is_n_for_equal_weights_and_1_for_one():
    assert effective_sample_size(torch.ones(7)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one entry"),
        (([[1.0]],), "shape is"),
        (([1.0, -1.0],), "finite and non-negative"),
        (([1.0, float("nan")],), "finite and non-negative"),
        (([1.0, float("inf")],), "finite and non-negative"),
    ],
)
def test_bad_scores_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resample(torch.tensor(arguments[0]), 1)


def test_bad_sizes_and_methods_are_refused():
    with pytest.raises(ValueError, match="between 1 and the 3 scores, but it is 4"):
        resample(torch.ones(3), 4)
    with pytest.raises(ValueError, match="at least 1, but it is 0"):
        resample(torch.ones(3), 0, "multinomial")
    with pytest.raises(ValueError, match="'systematic' or 'multinomial', but it is 'poisson'"):
        resample(torch.ones(3), 2, "poisson")
