"""τ is the paper's; a run's average of it starts at 1, and importance sampling follows that both ways."""

import math

import pytest
import reference
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from hf_importance import ImportanceTrainer
from hf_importance.theory.tau import derived_threshold, estimate_tau, tau_from_sums


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


# ---- In a run ----


def trained(folder, data, scored, resume=None, **overrides):
    """Train with so many of each 16 examples having a score, step by step: tau is the root of 16 over that."""
    settings = {"max_steps": len(scored), "logging_steps": 1, "tau_threshold": 2.0, **overrides}
    trainer = ImportanceTrainer(model=toys.vit(), args=toys.arguments(folder, **settings), train_dataset=data)

    def score(outputs, labels):
        return (torch.arange(len(labels)) % 16 < scored[trainer.state.global_step]).float()

    trainer.compute_score_func = score
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, *names):
    return [[e[f"importance/{name}"] for name in names] for e in trainer.state.log_history if "loss" in e]


def test_the_average_starts_at_1_and_forgets_by_the_momentum(tmp_path, digits):
    trainer = trained(tmp_path, digits.select(range(128)), [16, 4, 1], momentum=0.9, tau_threshold=3.9)
    expected, found = [1.0], logged(trainer, "tau")
    for tau in (1.0, 2.0, 4.0):
        expected.append(0.9 * expected[-1] + 0.1 * tau)
    assert [tau for (tau,) in found] == pytest.approx(expected[1:])
    assert trainer.sampler.run.tau() == found[-1][0]


def test_it_goes_on_above_the_threshold_and_off_again_below(tmp_path, digits):
    # The first tau is the threshold itself.
    trainer = trained(tmp_path, digits.select(range(128)), [4, 3, 2, 5, 16, 2], momentum=0.0)
    assert logged(trainer, "active", "switches") == [[0, 0], [1, 1], [1, 1], [0, 2], [0, 2], [1, 3]]
    assert [share for (share,) in logged(trainer, "active_share")] == [0, 0, 1, 1, 0, 0]
    assert trainer.sampler.active


def test_average_and_switches_survive_a_checkpoint(tmp_path, digits):
    data, scored = digits.select(range(128)), [4, 2, 2, 5, 16, 2]
    settings = {"momentum": 0.3, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", data, scored, **settings)
    resumed = trained(tmp_path / "resumed", data, scored, resume=str(tmp_path / "whole/checkpoint-3"), **settings)
    names = ("tau", "active", "active_share", "switches")
    assert logged(whole, *names) == logged(resumed, *names)
    assert logged(whole, "active", "switches")[2] == [1, 1]
