"""The cost rule is the best that integers allow, and says from which τ on importance sampling pays."""

import math

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_importance.costs import LARGEST_RATIO, pays_above, plan, relative_variance

BUDGETS = ["variance", "constant_variance", "constant_time"]


def value(budget, size, tau, kappa, pool, kept):
    """What the budget minimises."""
    cost, variance = (kappa * pool + kept) / size, relative_variance(pool, kept, size, tau)
    return {"variance": cost * variance, "constant_variance": cost, "constant_time": variance}[budget]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("tau", "kappa"), [(2.5, 1 / 3), (4.0, 1 / 3), (1.6, 0.1), (4.0, 0.1), (3.0, 0.05)])
def test_no_pair_of_integers_is_much_better(budget, tau, kappa):
    size = 32
    pool, kept = reference.cheapest_plan(budget, size, tau, kappa, largest=24 * size)
    found = plan(budget, size, tau, kappa)
    best, ours = value(budget, size, tau, kappa, pool, kept), value(budget, size, tau, kappa, found.pool, found.kept)
    # Rounding n up or down by less than 1 costs at most 1/32 of a step; time and variance promised are kept.
    assert best - 1e-9 <= ours <= best + 1 / size + 0.02 * best
    if budget == "constant_variance":
        assert relative_variance(found.pool, found.kept, size, tau) <= 1 + 1e-9
    if budget == "constant_time":
        assert found.cost <= 1 + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.floats(1.05, 8), st.floats(0.02, 0.8))
def test_for_large_batches_cost_times_variance_is_the_formula(tau, kappa):
    size = 10**6
    expected = (math.sqrt(kappa) + 1 / tau) ** 2
    if expected > 1:
        assert tau < pays_above(kappa)
        return
    assert tau >= pays_above(kappa) * (1 - 1e-9)
    for budget in BUDGETS:
        found = plan(budget, size, tau, kappa)
        if found.pool == LARGEST_RATIO * size:
            continue
        assert found.cost * relative_variance(found.pool, found.kept, size, tau) == pytest.approx(expected, rel=1e-3)
        assert found.cost == pytest.approx((kappa * found.pool + found.kept) / size)


def test_the_threshold_is_where_the_cost_is_that_of_a_uniform_step():
    for kappa in (1 / 3, 0.1, 0.05):
        tau = pays_above(kappa)
        assert plan("constant_variance", 10**6, tau, kappa).cost == pytest.approx(1, abs=1e-4)
        assert (math.sqrt(kappa) + 1 / pays_above(kappa, cost=1.02)) ** 2 == pytest.approx(1.02)
    assert pays_above(1.0) == pays_above(1.3) == math.inf


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_fixed_ratio_is_kept(budget):
    found = plan(budget, 32, tau=3.0, kappa=0.1, ratio=2.3)
    assert found.pool == 74
    assert found.kept == {"variance": 32, "constant_variance": 7, "constant_time": 24}[budget]
    # 7 is the fewest that keep the variance, 24 the most that keep the time.
    assert relative_variance(74, 7, 32, 3.0) <= 1 < relative_variance(74, 6, 32, 3.0)
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
    found = plan(budget, size, tau, kappa, ratio, unit=unit, largest=10 * size, smallest=smallest)
    assert min(smallest, size) <= found.kept <= size
    if ratio is None:
        assert found.pool > size
        assert (found.pool - size) % unit == 0
        assert found.pool <= max(10 * size, size + unit)


def test_the_margin_keeps_more():
    kept = [plan("constant_variance", 320, 4.0, 0.1, margin=margin).kept for margin in (1.0, 1.1, 2.0)]
    assert kept == [46, 50, 91]
    assert plan("constant_variance", 320, 1.0, 0.1, margin=2.0).kept == 320
