"""The learning rate raised with the gain: for the optimizer's step alone, by the factor that the twin gives."""

import math
from itertools import pairwise

import pytest
import reference
import torch
import toys
from transformers import TrainerCallback

from hf_importance import ImportanceTrainer
from hf_importance.learning_rate import LARGEST_FACTOR, learning_rate_factor


class Steps(TrainerCallback):
    """Keeps the parameters before and after every step, and the learning rate that the optimizer holds behind it."""

    def __init__(self):
        self.parameters, self.rates, self.used = [], [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.parameters.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.used.append({group["lr"] for group in optimizer.param_groups})

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append({group["lr"] for group in optimizer.param_groups})


def uneven(outputs, labels):
    return 1.0 + 9.0 * (labels == 0).float()


class Scores(ImportanceTrainer):
    """Keeps the scores of each step."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _inverse_moments(self, pools, weights=None):
        pools = list(pools)
        self.seen += [pool.tolist() for pool in pools]
        return super()._inverse_moments(pools, weights)


def train(tmp_path, kind=ImportanceTrainer, **overrides):
    settings = {
        "logging_steps": 1,
        "optim": "sgd",
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
    }
    args = toys.always_on(tmp_path, **{**settings, **overrides})
    trainer = kind(model=toys.bert(), args=args, train_dataset=toys.sentences(256), compute_score_func=uneven)
    trainer.steps = Steps()
    trainer.add_callback(trainer.steps)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [e[key] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
def test_the_factor(rule):
    for gain in (0.5, 1.0, 1.7, 3.9, 20.0):
        wanted = max(1.0, gain if rule == "linear" else gain**0.5)
        assert learning_rate_factor(gain, rule) == pytest.approx(min(wanted, LARGEST_FACTOR))


@pytest.mark.parametrize(("rule", "ratio"), [("linear", 3.0), ("sqrt", 8.0)])
def test_a_presampled_step_is_longer_by_the_root_or_all_of_its_gain(tmp_path, rule, ratio):
    # With replacement, where the gain follows from tau.
    settings = {"presample_ratio": ratio, "resampling": "multinomial"}
    plain = train(tmp_path / "plain", **settings)
    raised = train(tmp_path / "raised", **settings, learning_rate_scaling=rule)
    factors, taus = (logged(raised, "importance/" + key) for key in ("learning_rate_factor", "tau"))
    pool = round(16 * ratio)
    assert factors[0] == 1.0  # off
    # With a momentum of 0 the average is the tau of the step before.
    for factor, before in zip(factors[1:], taus, strict=False):
        gain = reference.presampled_gain(pool, 16, 16, before)
        assert factor == pytest.approx(max(gain if rule == "linear" else math.sqrt(gain), 1.0))
    assert max(factors) > 1.2
    # The schedule, the log and the optimizer after each step are the plain run's.
    assert logged(raised, "learning_rate") == logged(plain, "learning_rate")
    assert raised.steps.rates == plain.steps.rates
    # The first two steps begin at the same parameters; of the second the update is the factor times as long.
    first, second = ([b - a for a, b in pairwise(t.steps.parameters)] for t in (plain, raised))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(second[1], factors[1] * first[1], rtol=1e-3, atol=1e-6)
    assert "importance/learning_rate_factor" not in plain.state.log_history[0]


def test_without_replacement_the_gain_is_that_of_the_inclusion_probabilities(tmp_path):
    trainer = train(tmp_path, kind=Scores, presample_ratio=4.0, learning_rate_scaling="linear")
    factors = logged(trainer, "importance/learning_rate_factor")
    assert max(factors) > 1.5
    # With a momentum of 0 the scores of the step before say what keeping a quarter of 64 is worth.
    for factor, scores in zip(factors[1:], trainer.seen, strict=False):
        kept = sum(score**2 for score in scores) / reference.inverse_moment(scores, len(scores) // 4)
        assert factor == pytest.approx(min(max(64 / 16 * kept, 1.0), LARGEST_FACTOR))


def test_uniform_steps_keep_the_users_learning_rate(tmp_path):
    # Scores are flat from step 3 on: then it goes off.
    trainer = ImportanceTrainer(
        model=toys.bert(),
        args=toys.always_on(tmp_path, logging_steps=1, learning_rate_scaling="linear"),
        train_dataset=toys.sentences(256),
        compute_score_func=lambda o, y: uneven(o, y) if trainer.state.global_step < 3 else torch.ones(len(y)),
    )
    trainer.train()
    factors, active = (logged(trainer, "importance/" + key) for key in ("learning_rate_factor", "active_share"))
    assert active == [0, 1, 1, 1, 0, 0, 0, 0]
    assert [factor > 1 for factor in factors] == [share == 1 for share in active]
    assert factors[4:] == [1.0] * 4


def test_history_follows_its_measured_gain(tmp_path):
    settings = {"importance_method": "history", "max_steps": 80, "logging_steps": 1, "learning_rate": 1e-3}
    trainer = train(tmp_path, learning_rate_scaling="linear", **settings)
    factors, gains, active = (
        logged(trainer, "importance/" + key) for key in ("learning_rate_factor", "gain", "active_share")
    )
    assert active[-1] == 1
    # What is known before the step is what the step before has logged.
    for factor, before, on in zip(factors[1:], gains, active[1:], strict=False):
        assert factor == pytest.approx(min(max(before, 1.0), LARGEST_FACTOR) if on else 1.0)
    assert factors[-1] > 1.5


@pytest.mark.parametrize("settings", [{}, {"importance_method": "history", "max_steps": 70, "save_steps": 60}])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, settings):
    settings = {"save_strategy": "steps", "save_steps": 4, "learning_rate_scaling": "linear", **settings}
    whole = train(tmp_path / "whole", **settings)
    args = toys.always_on(
        tmp_path / "again",
        **{"logging_steps": 1, "optim": "sgd", "max_steps": 6, "max_grad_norm": 0.0, **settings},
    )
    resumed = ImportanceTrainer(toys.bert(), args, train_dataset=toys.sentences(256), compute_score_func=uneven)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{settings['save_steps']}"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert logged(whole, "importance/learning_rate_factor") == logged(resumed, "importance/learning_rate_factor")
    assert logged(whole, "importance/learning_rate_factor")[-1] > 1


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="learning_rate_scaling must be one of 'linear', 'sqrt', but it is 'cubic'"):
        toys.arguments(tmp_path, learning_rate_scaling="cubic")
    with pytest.raises(ValueError, match=r"'linear' spends the gain on longer steps.*'constant_variance' on cheaper"):
        toys.arguments(tmp_path, learning_rate_scaling="linear", importance_budget="constant_variance")
    args = toys.arguments(tmp_path, learning_rate_scaling="sqrt", optim="galore_adamw_layerwise")
    with pytest.raises(ValueError, match="optim='galore_adamw_layerwise' updates the parameters during the backward"):
        ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(64))
