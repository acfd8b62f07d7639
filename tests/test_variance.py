"""What keeping a share of a pool does to the variance: exactly, over every draw, and as it is averaged in a run."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_importance import estimate_tau, resample
from hf_importance.theory.costs import best_share, plan, relative_variance
from hf_importance.theory.sampling import inclusion_probabilities
from hf_importance.theory.variance import SHARES, WithoutReplacement, WithReplacement, inverse_moments

SCORES = [3.0, 0.1, 1.0, 0.4, 1.0, 0.02]


def measured(*pools):
    found = WithoutReplacement(momentum=0.0)
    found.average(sum(inverse_moments(torch.tensor(pool)) for pool in pools).tolist())
    return found


@pytest.mark.parametrize("kept", [1, 2, 3, 5])
def test_without_replacement_it_is_the_second_moment_of_every_draw(kept):
    # Gradients at right angles to each other: no product of two examples counts, whichever are drawn together.
    gradients = torch.diag(torch.tensor(SCORES, dtype=torch.float64))
    pi = inclusion_probabilities(torch.tensor(SCORES), kept)
    drawn = 0.0
    for order in itertools.permutations(range(len(SCORES))):
        for p, index in reference.systematic_outcomes(pi.tolist(), list(order)):
            weighted = gradients[index] / (len(SCORES) * pi[index, None])
            drawn += p / math.factorial(len(SCORES)) * float(weighted.sum(0).square().sum())
    # A uniform step of B examples has the mean square over B.
    uniform = sum(score**2 for score in SCORES) / len(SCORES) ** 2
    assert drawn / uniform == pytest.approx(reference.inverse_moment(SCORES, kept) / sum(s**2 for s in SCORES))


def test_with_replacement_it_is_the_second_moment_of_every_draw():
    # Two-stage: each pool of 2 of 3 gradients, with repeats, and each draw of 2 from it.
    scores, kept, size = [2.0, 0.5, 1.0], 2, 2
    gradients = torch.diag(torch.tensor(scores, dtype=torch.float64))
    drawn = 0.0
    tau_squared = 0.0
    for pool in itertools.product(range(3), repeat=size):
        probabilities = [scores[i] / sum(scores[j] for j in pool) for i in pool]
        tau_squared += reference.tau([scores[i] for i in pool]) ** -2 * sum(scores[i] ** 2 for i in pool)
        for p, index in reference.multinomial_outcomes(probabilities, kept):
            step = sum(gradients[pool[i]] / (size * probabilities[i]) for i in index) / kept
            drawn += p / 3**size * float((step - gradients.mean(0)).square().sum())
    # Second moments about 0 for one example, so less what the mean takes away once.
    second, mean = float(gradients.square().sum(1).mean()), float(gradients.mean(0).square().sum())
    tau_squared = 3**size * size * second / tau_squared
    factor = float(WithReplacement(tau_squared**0.5)(kept / size))
    # Of the pool the variance, of a draw from it the second moment but for the pool's own mean.
    pool_variance = (second - mean) / size
    assert drawn == pytest.approx(second / size * (factor - 1) - (pool_variance + mean) / kept + pool_variance)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 70.0]), min_size=16, max_size=16), st.integers(0, 3))
def test_it_is_that_of_the_inclusion_probabilities(scores, power):
    kept = 2**power
    found = inverse_moments(torch.tensor(scores))
    expected = reference.inverse_moment(scores, kept) if any(scores) else 0.0
    assert found[SHARES == kept / 16][0] == pytest.approx(expected, rel=1e-6)
    assert found[-1] == pytest.approx(sum(s * s for s in scores), rel=1e-6)
    assert (np.diff(found) <= 1e-9 * found[0]).all()


def test_weights_stand_for_so_many_examples():
    repeated = [3.0, 3.0, 3.0, 1.0, 0.2, 0.2]
    weighted = inverse_moments(torch.tensor([3.0, 1.0, 0.2]), torch.tensor([3.0, 1.0, 2.0]))
    np.testing.assert_allclose(weighted, inverse_moments(torch.tensor(repeated)))


def test_while_no_example_is_certain_it_is_one_over_tau_squared():
    scores = [1.0, 2.0, 3.0, 4.0] * 8
    tau = float(estimate_tau(torch.tensor(scores)))
    for share in (1 / 8, 1 / 4):
        assert float(measured(scores)(share)) == pytest.approx(1 / (tau**2 * share))


def test_equal_scores_never_pay_and_hard_ones_cost_their_scoring():
    share, price = best_share(measured([1.0] * 32), kappa=0.1)
    assert (share, price) == (1.0, pytest.approx(1.1))
    # One in eight holds everything: scored, and kept for certain.
    share, price = best_share(measured([8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 4), kappa=0.1)
    assert (share, price) == (pytest.approx(1 / 8), pytest.approx(0.1 + 1 / 8))


def test_nothing_is_promised_before_anything_is_known():
    fresh = WithoutReplacement(momentum=0.9)
    assert best_share(fresh, kappa=0.05) == (1.0, pytest.approx(1.05))
    fresh.average([0.0] * len(SHARES))
    assert best_share(fresh, kappa=0.05)[1] > 1


def test_what_is_averaged_are_the_moments():
    # Noise adds up over steps: one with a tenth of the gradients has a hundredth of the say.
    found, small = WithoutReplacement(momentum=0.75), [0.1 * score for score in (1.0, 1.0, 0.0, 1.0)]
    found.average(inverse_moments(torch.tensor(SCORES)).tolist())
    found.average(inverse_moments(torch.tensor(small)).tolist())
    expected = 0.75 * inverse_moments(torch.tensor(SCORES)) + inverse_moments(torch.tensor(small))
    np.testing.assert_allclose(found(SHARES), expected / expected[-1])


def test_below_the_smallest_share_it_grows_as_fast_as_the_share_falls():
    found = measured(SCORES)
    assert float(found(1 / 1024)) == pytest.approx(4 * float(found(1 / 256)))


def test_the_state_survives_a_round_trip():
    twin = WithoutReplacement(momentum=0.5)
    twin.load(measured(SCORES).state())
    np.testing.assert_array_equal(twin(SHARES), measured(SCORES)(SHARES))


def test_pools_drawn_by_the_plan_have_the_noise_of_a_uniform_step():
    # Statistics, on gradients of any direction: 64 dimensions, norms that differ by orders of magnitude.
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(2000, generator=generator, dtype=torch.float64).mul(1.5).exp()
    gradients = torch.nn.functional.normalize(torch.randn(2000, 64, generator=generator, dtype=torch.float64))
    gradients = gradients * norms[:, None]
    mean, size = gradients.mean(0), 32
    factor = WithoutReplacement(momentum=0.9)
    for _ in range(200):
        factor.average(inverse_moments(norms[torch.randint(2000, (size,), generator=generator)]).tolist())
    planned = plan("constant_variance", size, factor, kappa=0.2)
    assert planned.cost < 0.7

    def noise(draw, steps=4000):
        return sum(float((draw() - mean).square().sum()) for _ in range(steps)) / steps

    def uniform():
        return gradients[torch.randint(2000, (size,), generator=generator)].mean(0)

    def drawn():
        pool = torch.randint(2000, (planned.pool,), generator=generator)
        index, weights = resample(norms[pool], planned.kept, "systematic", generator)
        return (gradients[pool[index]] * weights[:, None]).mean(0)

    predicted = relative_variance(planned.pool, planned.kept, size, factor)
    assert predicted <= 1 + 1e-9
    assert noise(drawn) / noise(uniform) == pytest.approx(predicted, abs=0.2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=64), st.floats(0.01, 0.9))
def test_the_price_without_replacement_lies_between_its_bounds(scores, kappa):
    tau = reference.tau(scores)
    price = best_share(measured(scores), kappa)[1]
    assert kappa + tau**-2 <= price * (1 + 1e-2)
    assert price <= min(best_share(WithReplacement(tau), kappa)[1], 1 + kappa) * (1 + 1e-2)
