"""``importance_method="auto"``: uniform, presampled or revisited, whichever the measured numbers say is cheapest."""

import itertools
import math

import pytest
import torch
import toys
from transformers import Trainer

from hf_importance import ImportanceTrainer
from hf_importance.theory.costs import Plan, plan, price, relative_variance
from hf_importance.theory.variance import WithReplacement

EXAMPLES, BATCH = 256, 16
STEPS = EXAMPLES // BATCH  # an epoch


class Sources(ImportanceTrainer):
    """Keeps by what each step was drawn, what it was trained on, and how many forward passes scored."""

    def __init__(self, *args, **kwargs):
        self.sources, self.kept, self.scoring_passes = [], [], 0
        super().__init__(*args, **kwargs)
        self.model.register_forward_hook(self.count)

    def count(self, module, *_):
        self.scoring_passes += not module.training

    def training_step(self, model, inputs, *args, **kwargs):
        self.sources.append(self.sampler.source if self.sampler.active else "uniform")
        self.kept.append({**inputs, **toys.given(self)})
        return super().training_step(model, inputs, *args, **kwargs)


def persistent(outputs, labels):
    """One class in four has ten times the score: what is remembered stays true. tau is 1.56, its square 2.44."""
    return 1.0 + 9.0 * (labels == 0).float()


def forgetful(outputs, labels):
    """One example in eight of any batch has all the score: nothing worth remembering. tau is sqrt(8)."""
    return (torch.arange(len(labels)) % 8 == 0).float()


def even(outputs, labels):
    return torch.ones(len(labels))


def trained(tmp_path, score, kind=Sources, data=None, resume=None, **overrides):
    settings = {"importance_method": "auto", "max_steps": 6 * STEPS, "logging_steps": 4, **overrides}
    trainer = kind(
        model=toys.bert(dropout=0.1),
        args=toys.arguments(tmp_path, **settings),
        train_dataset=toys.sentences(EXAMPLES) if data is None else data,
        **({} if score is None else {"compute_score_func": score}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def spans(sources):
    return [(name, len(list(steps))) for name, steps in itertools.groupby(sources)]


# ---- The price ----


@pytest.mark.parametrize("kappa", [0.05, 0.1, 1 / 3])
@pytest.mark.parametrize("tau", [1.5, 3.0, 6.0])
def test_the_price_of_the_best_plan_is_that_of_the_rule(kappa, tau):
    for budget in ("variance", "constant_variance", "constant_time"):
        planned = plan(budget, 4096, WithReplacement(tau), kappa)
        bounded = planned.pool >= 16 * 4096
        found = price(planned, 4096, WithReplacement(tau), budget)
        assert found == pytest.approx((math.sqrt(kappa) + 1 / tau) ** 2, rel=2e-3) or bounded


def test_the_price_of_a_given_plan_counts_cost_and_noise():
    # 96 scored at 1/3 and 32 kept cost 2; the noise is 1/3 of the pool's own and 1/4 of the draw's.
    planned = Plan(pool=96, kept=32, cost=2.0)
    assert price(planned, 32, WithReplacement(2.0), "variance") == pytest.approx(2 * (1 / 3 + 1 / 4))
    # What nobody asked for is no gain: less noise here, less time there.
    assert price(planned, 32, WithReplacement(2.0), "constant_variance") == 2.0
    assert price(Plan(pool=96, kept=8, cost=0.5), 32, WithReplacement(2.0), "constant_time") == pytest.approx(4 / 3)
    assert relative_variance(96, 32, 32, WithReplacement(2.0)) == pytest.approx(1 / 3 + 1 / 4)


# ---- What it chooses ----


def test_nothing_to_win_is_the_plain_run(tmp_path):
    # Measuring kappa costs 5 forward passes, and one more now and then, and moves nothing.
    ours = trained(tmp_path / "a", even, max_steps=2 * STEPS)
    plain = Trainer(
        model=toys.bert(dropout=0.1), args=toys.arguments(tmp_path / "b", max_steps=2 * STEPS, logging_steps=4),
        train_dataset=toys.sentences(EXAMPLES),
    )  # fmt: skip
    plain.train()
    assert set(ours.sources) == {"uniform"} and ours.scoring_passes == 5
    assert torch.equal(parameters(ours), parameters(plain))


def test_what_can_be_remembered_is(tmp_path):
    ours = trained(tmp_path, persistent, kappa=0.8, importance_budget="constant_variance")
    assert spans(ours.sources)[-1][0] == "history" and "presample" not in ours.sources
    assert ours.scoring_passes == 0


def test_what_cannot_be_remembered_is_presampled(tmp_path):
    # Training finds other scores, since an example then has another place: calibrated, they were worth nothing.
    ours = trained(tmp_path, forgetful, kappa=0.05, importance_budget="constant_variance", calibrate=False)
    assert spans(ours.sources)[-1][0] == "presample" and "history" not in ours.sources
    log = [e for e in ours.state.log_history if "loss" in e]
    assert log[-1]["importance/presampling"] == log[-1]["importance/active"] == 1
    tau = log[-1]["importance/tau"]
    assert tau == pytest.approx(math.sqrt(8), rel=0.1)  # where a pool is no multiple of 8, a little less
    assert log[-1]["importance/price_presample"] < 0.5
    assert log[-1]["importance/gain"] == pytest.approx(1, abs=0.1)


def test_what_training_does_not_find_again_is_worth_nothing(tmp_path):
    ours = trained(tmp_path, forgetful, kappa=0.05, importance_budget="constant_variance")
    assert "presample" in ours.sources and spans(ours.sources)[-1][0] == "uniform"


def test_what_neither_pays_for_stays_uniform(tmp_path):
    ours = trained(tmp_path, forgetful, kappa=0.95, max_steps=3 * STEPS)
    assert set(ours.sources) == {"uniform"}


def test_presampling_gives_way_to_memory_once_that_is_cheaper(tmp_path):
    ours = trained(tmp_path, persistent, kappa=0.02, importance_budget="constant_variance")
    found = spans(ours.sources)
    assert [name for name, _ in found[:3]] == ["uniform", "presample", "history"]
    # On, and over to memory: two switches, which training logs say.
    entries = [e for e in ours.state.log_history if "importance/switches" in e]
    told = {e["importance/switches"]: e["importance/switched_at"] for e in entries if e["importance/switches"]}
    assert [told[1], told[2]] == list(itertools.accumulate(length for _, length in found[:2]))


# ---- The table ----


def test_pools_fill_the_table(tmp_path):
    settings = {"importance_budget": "constant_variance", "max_steps": STEPS // 2, "logging_steps": 1}
    ours = trained(tmp_path, persistent, kappa=0.02, **settings)
    assert "presample" in ours.sources
    table = ours.importance_table()
    labels = torch.as_tensor(toys.sentences(EXAMPLES)["labels"])
    scores = torch.tensor(table["score"][:])
    seen = ~scores.isnan()
    assert torch.equal(scores[seen], persistent(None, labels)[seen])
    steps = ours.sources.index("presample")
    log = [e for e in ours.state.log_history if "loss" in e]
    first_pool = log[steps]["importance/examples_scored"]
    assert first_pool > BATCH and int(seen.sum()) > steps * BATCH + first_pool
    # Only what was trained on counts as a visit, and its weights add up to as many, in expectation.
    assert sum(table["visits"][:]) == log[-1]["importance/examples_trained"] < int(seen.sum())
    drawn = sum(float(b["importance_weights"].sum()) for b in ours.kept if "importance_weights" in b)
    assert sum(table["weight_sum"][:]) == pytest.approx(steps * BATCH + drawn, rel=0.35)


# ---- Resuming ----


@pytest.mark.parametrize(("score", "kappa"), [(persistent, 0.02), (forgetful, 0.05)])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, score, kappa):
    settings = {"importance_budget": "constant_variance", "save_strategy": "steps", "save_steps": 7, "kappa": kappa}
    whole = trained(tmp_path, score, **settings)
    changes = list(itertools.accumulate(length for _, length in spans(whole.sources)))
    assert len(changes) >= 2
    for step in (7, 21, 49):
        resumed = trained(tmp_path / f"{step}", score, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
        assert resumed.sources == whole.sources[step:]
        assert torch.equal(parameters(whole), parameters(resumed)), step
        assert whole.importance_table()["score"][:] == resumed.importance_table()["score"][:]
        # The pairs that the next calibration is made of, too, which decide only later.
        ours, theirs = (trainer.sampler.run.table.pairs for trainer in (whole, resumed))
        assert len(ours) and torch.equal(ours, theirs)


# ---- What has no index, and what has no effect ----


def test_a_stream_is_presampled_or_not_and_a_warning_says_so(tmp_path, caplog):
    data = toys.sentences(EXAMPLES).to_iterable_dataset()
    ours = trained(tmp_path, forgetful, kappa=0.05, data=data, max_steps=3 * STEPS)
    assert "presample" in ours.sources
    assert "chooses between presampling and uniform steps only" in caplog.text and "must be map-style" in caplog.text


def test_a_threshold_has_no_effect_and_a_warning_says_so(tmp_path, caplog):
    plain = trained(tmp_path / "plain", persistent, kappa=0.02, max_steps=STEPS)
    assert "no effect" not in caplog.text
    ours = trained(tmp_path / "ours", persistent, kappa=0.02, max_steps=STEPS, tau_threshold=3.0)
    assert "tau_threshold: no effect with importance_method='auto'." in caplog.text
    assert ours.sources == plain.sources and "presample" in ours.sources
