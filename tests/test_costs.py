"""The cost rule is the best that integers allow, and says from which τ on importance sampling pays."""

import math

import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_importance.theory.costs import LARGEST_RATIO, best_share, plan, relative_variance
from hf_importance.theory.variance import WithoutReplacement, WithReplacement, inverse_moments

BUDGETS = ["variance", "constant_variance", "constant_time"]


def value(budget, size, tau, kappa, pool, kept):
    """What the budget minimises."""
    cost, variance = (kappa * pool + kept) / size, relative_variance(pool, kept, size, WithReplacement(tau))
    return {"variance": cost * variance, "constant_variance": cost, "constant_time": variance}[budget]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("tau", "kappa"), [(2.5, 1 / 3), (4.0, 1 / 3), (1.6, 0.1), (4.0, 0.1), (3.0, 0.05)])
def test_no_pair_of_integers_is_much_better(budget, tau, kappa):
    size = 32
    pool, kept = reference.cheapest_plan(budget, size, tau, kappa, largest=24 * size)
    found = plan(budget, size, WithReplacement(tau), kappa)
    best, ours = value(budget, size, tau, kappa, pool, kept), value(budget, size, tau, kappa, found.pool, found.kept)
    # Rounding n up or down by less than 1 costs at most 1/32 of a step; time and variance promised are kept.
    assert best - 1e-9 <= ours <= best + 1 / size + 0.02 * best
    if budget == "constant_variance":
        assert relative_variance(found.pool, found.kept, size, WithReplacement(tau)) <= 1 + 1e-9
    if budget == "constant_time":
        assert found.cost <= 1 + 1e-9


@settings(max_examples=50, deadline=None)
@example(3.0, 0.75)
@given(st.floats(1.05, 8), st.floats(0.02, 0.8))
def test_for_large_batches_cost_times_variance_is_the_formula(tau, kappa):
    size = 10**6
    expected = (math.sqrt(kappa) + 1 / tau) ** 2
    share, cheapest = best_share(WithReplacement(tau), kappa)
    if expected > 1 + kappa or math.sqrt(kappa) > tau:
        return  # keeping all of the pool is better
    assert cheapest == pytest.approx(expected, rel=1e-3)
    assert share == pytest.approx(math.sqrt(kappa) / tau, rel=0.02)
    for budget in BUDGETS:
        found = plan(budget, size, WithReplacement(tau), kappa)
        if found.pool in (size + 1, LARGEST_RATIO * size):
            continue  # the best pool is out of bounds
        variance = relative_variance(found.pool, found.kept, size, WithReplacement(tau))
        assert found.cost * variance == pytest.approx(expected, rel=1e-3)
        assert found.cost == pytest.approx((kappa * found.pool + found.kept) / size)


@pytest.mark.parametrize("kappa", [1 / 3, 0.1, 0.05])
def test_with_replacement_it_pays_above_the_threshold_of_tau(kappa):
    threshold = 1 / (1 - math.sqrt(kappa))
    for tau in (threshold - 0.01, threshold + 0.01):
        planned = plan("constant_variance", 10**6, WithReplacement(tau), kappa)
        assert (planned.cost < 1) == (tau > threshold)


def factor_of(scores):
    found = WithoutReplacement(momentum=0.0)
    found.average(inverse_moments(torch.tensor(scores)).tolist())
    return found


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kappa", [0.05, 0.2, 1 / 3])
def test_without_replacement_no_pair_of_integers_is_much_better(budget, kappa):
    size, factor = 32, factor_of([0.02 * 1.3**k for k in range(32)])
    found = plan(budget, size, factor, kappa)
    values = {}
    for pool in range(size + 1, LARGEST_RATIO * size):
        for kept in range(1, size + 1):
            cost, variance = (kappa * pool + kept) / size, relative_variance(pool, kept, size, factor)
            kind = {"variance": (kept == size, cost * variance), "constant_variance": (variance <= 1 + 1e-9, cost)}
            allowed, result = kind.get(budget, (cost <= 1 + 1e-9, variance))
            if allowed:
                values[pool, kept] = result
    best, ours = min(values.values()), values[found.pool, found.kept]
    assert best - 1e-9 <= ours <= best + 1 / size + 0.02 * best


def test_the_same_scores_are_drawn_more_cheaply_without_replacement():
    scores = [0.02 * 1.3**k for k in range(32)]
    tau = reference.tau(scores)
    for kappa in (0.05, 0.2, 1 / 3):
        assert best_share(factor_of(scores), kappa)[1] < 0.8 * best_share(WithReplacement(tau), kappa)[1]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("overhead", [0.0, 0.3, 0.6])
def test_an_overhead_is_counted_and_no_pair_of_integers_is_much_better(budget, overhead):
    size, kappa, factor = 32, 0.1, WithReplacement(4.0)
    found = plan(budget, size, factor, kappa, overhead=overhead)
    values = {}
    for pool in range(size + 1, LARGEST_RATIO * size):
        for kept in range(1, size + 1):
            cost = overhead + (kappa * pool + (1 - overhead) * kept) / size
            variance = relative_variance(pool, kept, size, factor)
            kind = {"variance": (kept == size, cost * variance), "constant_variance": (variance <= 1 + 1e-9, cost)}
            allowed, result = kind.get(budget, (cost <= 1 + 1e-9, variance))
            if allowed:
                values[pool, kept] = result
            if (pool, kept) == (found.pool, found.kept):
                assert found.cost == pytest.approx(cost)
    best, ours = min(values.values()), values[found.pool, found.kept]
    assert best - 1e-9 <= ours <= best * 1.03 + 1 / size


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_fixed_ratio_is_kept(budget):
    found = plan(budget, 32, WithReplacement(3.0), kappa=0.1, ratio=2.3)
    assert found.pool == 74
    assert found.kept == {"variance": 32, "constant_variance": 7, "constant_time": 24}[budget]
    # 7 is the fewest that keep the variance, 24 the most that keep the time.
    assert relative_variance(74, 7, 32, WithReplacement(3.0)) <= 1 < relative_variance(74, 6, 32, WithReplacement(3.0))
    assert 0.1 * 74 + 24 <= 32 < 0.1 * 74 + 25


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(BUDGETS),
    st.integers(1, 64),
    st.floats(1, 20),
    st.floats(1e-3, 2),
    st.one_of(st.none(), st.floats(1.01, 9)),
    st.integers(1, 16),
    st.integers(1, 3),
)
def test_pool_and_kept_stay_in_their_bounds(budget, size, tau, kappa, ratio, unit, smallest):
    found = plan(budget, size, WithReplacement(tau), kappa, ratio, unit=unit, largest=10 * size, smallest=smallest)
    assert min(smallest, size) <= found.kept <= size
    if ratio is None:
        assert found.pool > size
        assert (found.pool - size) % unit == 0
        assert found.pool <= max(10 * size, size + unit)


def test_the_margin_keeps_more():
    def kept(tau, margin):
        return plan("constant_variance", 320, WithReplacement(tau), 0.1, margin=margin).kept

    assert [kept(4.0, margin) for margin in (1.0, 1.1, 2.0)] == [46, 50, 91]
    assert kept(1.0, 2.0) == 320
