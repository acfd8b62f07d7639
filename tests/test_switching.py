"""τ is the paper's, starts at 1, and the switch follows its average both ways."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_importance.switching import Switch, derived_threshold, estimate_tau, tau_from_sums


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_tau_is_equation_29(scores):
    expected = reference.tau(scores)
    assert float(estimate_tau(torch.tensor(scores, dtype=torch.float64))) == pytest.approx(expected, rel=1e-6)
    assert tau_from_sums(len(scores), sum(scores), sum(s * s for s in scores)) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20))
def test_tau_lies_between_1_and_the_root_of_the_number(scores):
    tau = tau_from_sums(len(scores), sum(scores), sum(s * s for s in scores))
    assert 1 <= tau <= math.sqrt(len(scores)) * (1 + 1e-9)


def test_tau_squared_is_how_much_the_second_moment_falls():
    # Uniform: B Σ G² / B² ; by score: (Σ G)² / B². The ratio is B Σ G² / (Σ G)² = τ².
    scores = torch.tensor([0.2, 1.0, 3.0, 0.1], dtype=torch.float64)
    by_score = scores / scores.sum()
    second_moment = lambda p: float((p * (scores / (4 * p)) ** 2).sum())  # noqa: E731
    gain = second_moment(torch.full((4,), 0.25, dtype=torch.float64)) / second_moment(by_score)
    assert float(estimate_tau(scores)) ** 2 == pytest.approx(gain, rel=1e-12)


def test_no_scores_and_zero_scores_mean_nothing_to_win():
    assert tau_from_sums(0, 0.0, 0.0) == 1
    assert tau_from_sums(5, 0.0, 0.0) == 1
    assert float(estimate_tau(torch.zeros(5))) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_scores_give_nan(bad):
    assert math.isnan(tau_from_sums(3, bad, 1.0))
    assert math.isnan(tau_from_sums(3, 1.0, bad))


def test_estimate_tau_refuses_what_is_no_vector():
    with pytest.raises(ValueError, match="at least one entry"):
        estimate_tau(torch.zeros(0))
    with pytest.raises(ValueError, match=r"shape is \(2, 2\)"):
        estimate_tau(torch.ones(2, 2))


def test_the_derived_threshold_is_b_plus_3b_over_3b():
    for size, pool in [(16, 48), (32, 128), (128, 640)]:
        assert derived_threshold(pool / size) == pytest.approx((pool + 3 * size) / (3 * size))


def test_the_average_starts_at_1_and_forgets_by_the_momentum():
    switch = Switch(threshold=2.0, momentum=0.9)
    expected = 1.0
    for tau in (1.0, 3.0, 5.0):
        switch.update(tau)
        expected = 0.9 * expected + 0.1 * tau
    assert switch.tau == pytest.approx(expected)


def test_it_goes_on_above_the_threshold_and_off_again_below():
    switch = Switch(threshold=2.0, momentum=0.0)
    assert [switch.update(tau) for tau in (2.0, 2.1, 3.0, 1.9, 1.0, 2.5)] == [False, True, False, True, False, True]
    assert switch.active
    assert switch.switches == 3


def test_the_state_survives_a_round_trip():
    switch = Switch(2.0, 0.5)
    switch.update(4.0)
    twin = Switch(2.0, 0.5)
    twin.load_state_dict(switch.state_dict())
    assert (twin.tau, twin.active, twin.switches) == (2.5, True, 1)
