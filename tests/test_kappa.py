"""kappa is what scoring costs against training, data included; it is frozen, saved, and the same on all ranks."""

import json
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import toys
from accelerate import Accelerator
from transformers import Trainer

from hf_importance import ImportanceTrainer, Presample
from hf_importance.ranks import Ranks
from hf_importance.run.clock import FEW_SAMPLES, SAMPLES, WARM_UP, Clock
from hf_importance.theory.costs import ASSUMED_KAPPA

PROBES = WARM_UP + SAMPLES


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, seconds):
        ctx.seconds = seconds
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


class Slow(torch.nn.Module):
    """A classifier whose forward and backward pass take known times for 16 examples, and of fewer this share at least.

    The rest shrinks in proportion.
    """

    loss_type = "ForSequenceClassification"

    def __init__(self, forward, backward, overhead=0.0):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seconds, self.overhead = (forward, backward), overhead

    def forward(self, pixel_values, labels=None):
        share = self.overhead + (1 - self.overhead) * len(pixel_values) / 16
        time.sleep(self.seconds[0] * share)
        logits = self.layer(pixel_values.flatten(1))
        if torch.is_grad_enabled():
            logits = SlowBackward.apply(logits, self.seconds[1] * share)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class SlowData(torch.utils.data.Dataset):
    def __init__(self, data, seconds):
        self.data, self.seconds = [data[i] for i in range(len(data))], seconds

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if self.seconds:
            time.sleep(self.seconds)
        return self.data[index]


def flat(outputs, labels):
    return torch.ones(len(labels))


def skewed(outputs, labels):
    return (torch.arange(len(labels)) % 8 == 0).float()


def auto(tmp_path, **overrides):
    return toys.arguments(tmp_path, presample_ratio="auto", tau_threshold=None, logging_steps=1, **overrides)


def clock_of(trainer):
    return trainer.sampler.run.clock


# A sleep is at least as long as asked for; on a busy machine longer, the shorter the more. Hence the tolerance.
@pytest.mark.parametrize(
    ("forward", "backward", "load", "expected"),
    [
        (0.03, 0.06, 0.0, 1 / 3),
        (0.03, 0.27, 0.0, 0.1),
        # 16 examples a batch: waiting 0.064 for it, whatever is then done with it.
        (0.02, 0.04, 0.004, (0.064 + 0.02) / (0.064 + 0.06)),
    ],
)
def test_it_is_measured_while_off_data_included(tmp_path, digits, forward, backward, load, expected):
    data = SlowData(digits.select(range(128)), load)
    args = auto(tmp_path, max_steps=PROBES + 2)
    trainer = toys.run(ImportanceTrainer, Slow(forward, backward), args, data, compute_score_func=flat)
    logged = [e["importance/kappa"] for e in trainer.state.log_history if "loss" in e]
    assert logged[:PROBES] == [ASSUMED_KAPPA] * PROBES
    assert logged[-1] == pytest.approx(expected, rel=0.5)
    assert logged[-1] != ASSUMED_KAPPA
    last = trainer.state.log_history[-2]
    assert last["importance/price_presample"] == pytest.approx(1 + logged[-1], rel=0.3)  # all scores are alike
    assert "importance/tau_threshold" not in last
    assert last["importance/examples_scored"] == 0  # a probe is no pool


def test_it_is_measured_while_on_where_nothing_waits_for_it(tmp_path, digits):
    args = toys.always_on(tmp_path, max_steps=PROBES + 3, logging_steps=1)
    data = SlowData(digits.select(range(128)), 0.0)
    trainer = toys.run(ImportanceTrainer, Slow(0.03, 0.06), args, data, compute_score_func=skewed)
    logged = [e["importance/kappa"] for e in trainer.state.log_history if "loss" in e]
    assert logged[0] == ASSUMED_KAPPA
    # Scoring 48 in three passes of 0.03 for 16.
    assert logged[-1] == pytest.approx(1 / 3, rel=0.5)
    assert logged[-1] != ASSUMED_KAPPA
    assert clock_of(trainer).measured


@pytest.mark.parametrize(("overhead", "stays"), [(0.0, True), (0.4, True), (1.0, False)])
def test_what_does_not_shrink_with_the_batch_is_measured(tmp_path, digits, overhead, stays):
    # Scoring 20 of 16 a batch costs 0.2 of a step, keeping few nothing but the overhead.
    args = auto(tmp_path, importance_budget="constant_variance", max_steps=4 * PROBES)
    data = SlowData(digits.select(range(128)), 0.0)
    trainer = toys.run(ImportanceTrainer, Slow(0.02, 0.1, overhead), args, data, compute_score_func=skewed)
    assert clock_of(trainer).overhead == pytest.approx(overhead, abs=0.2)
    log = [e for e in trainer.state.log_history if "loss" in e]
    assert log[-1]["importance/overhead"] == clock_of(trainer).overhead
    assert max(e["importance/active"] for e in log) == 1
    assert bool(log[-1]["importance/active"]) == stays


def test_pools_are_held_against_the_last_whole_batches(tmp_path, digits):
    args = auto(tmp_path, importance_budget="constant_variance", max_steps=10 * PROBES)
    data = SlowData(digits.select(range(128)), 0.0)
    trainer = ImportanceTrainer(model=Slow(0.005, 0.025), args=args, train_dataset=data)

    def score(outputs, labels):
        # Once kappa is known the machine becomes four times as slow; six whole batches later it pays to presample.
        if clock_of(trainer).measured:
            trainer.model.seconds = (0.02, 0.1)
        return skewed(outputs, labels) if trainer.state.global_step >= 2 * PROBES + 2 else flat(outputs, labels)

    trainer.compute_score_func = score
    trainer.train()
    assert clock_of(trainer).overhead == pytest.approx(0.0, abs=0.2)
    assert clock_of(trainer).kappa == pytest.approx(1 / 6, rel=0.5)
    assert trainer.state.log_history[-2]["importance/active"] == 1


# ---- The clock alone, by a time that passes as it is told ----


class Steps:
    """Steps of 16 examples whose parts take as long as they are told; it counts what is asked of it."""

    def __init__(self, monkeypatch):
        self.now, self.looks, self.probes = 1.0, 0, 0
        monkeypatch.setattr("hf_importance.run.clock.time", SimpleNamespace(perf_counter=self.look))
        self.clock = Clock(torch.device("cpu"), Ranks(Accelerator(cpu=True)))

    def look(self):
        self.looks += 1
        return self.now

    def probe(self, seconds):
        self.now += seconds
        self.probes += 1
        return 16

    def train(self, seconds, examples=16):
        with self.clock.training_on({"labels": torch.zeros(examples)}):
            self.now += seconds

    def uniform(self, score, train):
        self.clock.begin_step(wanted=True)
        self.clock.probe(16, lambda: self.probe(score))
        self.train(train)
        self.clock.learn(batch_size=16)

    def by_pool(self, score, train, pool=20, kept=4):
        self.clock.begin_step(wanted=True)
        with self.clock.scoring(lambda: pool, kept / 16):
            self.now += score
        self.train(train, kept)
        self.clock.learn(batch_size=16)


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


def test_the_overhead_is_not_measured_where_training_was_not(steps):
    steps.clock.load(0.2)
    for _ in range(WARM_UP + FEW_SAMPLES):
        steps.by_pool(score=0.1, train=0.1)
    assert (steps.clock.overhead, steps.looks) == (None, 0)
    steps.clock.load(0.2, training=0.01)
    for _ in range(WARM_UP + FEW_SAMPLES):
        steps.by_pool(score=0.1, train=0.1)
    assert steps.clock.overhead is not None and steps.looks > 0


def test_one_slow_batch_does_not_count(steps):
    for batch in range(PROBES):
        assert not steps.clock.measured
        # The first of all is a warm-up, and one is slow for another reason.
        steps.uniform(score=0.3 if batch in (0, 3) else 0.02, train=0.04)
    assert steps.clock.measured
    assert steps.clock.kappa == pytest.approx(0.5)
    # Then it stays as it is, and nothing is scored for it.
    for _ in range(PROBES):
        steps.uniform(score=0.01, train=0.04)
    assert steps.clock.kappa == pytest.approx(0.5)
    assert steps.probes == PROBES


def test_other_programs_that_slow_every_other_batch_do_not_count_on_a_cpu(steps):
    for batch in range(PROBES):
        odd = batch % 2
        steps.uniform(score=1.6 * (2.5 if odd else 1.0), train=6.4 * (1.0 if odd else 2.5))
    assert steps.clock.kappa == pytest.approx(0.25, rel=0.01)


def test_a_machine_that_became_slower_changes_neither_kappa_nor_the_overhead(steps):
    steps.clock.load(0.25, training=0.4)
    # All takes three times as long as then. Of a step of 16 examples 0.2 does not shrink.
    for _ in range(PROBES):
        steps.uniform(score=0.0, train=3 * 16 * 0.4)
    for _ in range(WARM_UP + FEW_SAMPLES):
        assert steps.clock.overhead is None
        steps.by_pool(score=3 * 20 * 0.1, train=3 * 16 * 0.4 * (0.2 + 0.8 * 4 / 16), pool=20, kept=4)
    found = steps.clock.kappa, steps.clock.overhead
    assert found == (pytest.approx(0.25, rel=0.01), pytest.approx(0.2, rel=0.01))
    # Nobody looks at the time again.
    looks = steps.looks
    for _ in range(WARM_UP + FEW_SAMPLES):
        steps.by_pool(score=1.0, train=1.0)
    assert (steps.clock.kappa, steps.clock.overhead, steps.looks) == (*found, looks)


@pytest.mark.parametrize(("presampling", "kappa"), [(0.0, 0.001), (2.0, 0.99)])
def test_it_stays_between_0_and_1(steps, presampling, kappa):
    for _ in range(PROBES):
        steps.uniform(score=presampling, train=1.0)
    assert steps.clock.measured
    assert steps.clock.kappa == kappa


# ---- Nothing else moves ----


def test_off_is_still_exactly_the_plain_trainer(tmp_path, digits):
    trainers, streams = [], []
    for kind in (ImportanceTrainer, Trainer):
        recorder = toys.Recorder()
        options = {"compute_score_func": flat} if kind is ImportanceTrainer else {}
        data = toys.Augmented(digits.select(range(100)))
        trainer = kind(
            model=toys.vit(0.2), args=auto(tmp_path, max_steps=9), train_dataset=data, callbacks=[recorder], **options
        )
        trainer.train()
        trainers.append(trainer)
        streams.append(recorder.streams)
    assert clock_of(trainers[0]).measured
    assert streams[0] == streams[1]
    for one, other in zip(*(trainer.model.state_dict().values() for trainer in trainers), strict=True):
        assert torch.equal(one, other)


def test_no_probe_where_no_decision_waits_for_it(tmp_path, digits):
    model, calls = toys.vit(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    args = toys.arguments(tmp_path, importance_budget="constant_variance", tau_threshold=3.9)
    toys.run(ImportanceTrainer, model, args, digits.select(range(100)))
    assert len(calls) == 8


def test_a_resumed_run_decides_the_same(tmp_path, digits):
    data = SlowData(digits.select(range(128)), 0.0)

    def build(folder):
        args = toys.always_on(
            folder,
            presample_ratio="auto",
            importance_budget="constant_variance",
            tau_threshold=None,
            momentum=0.8,
            save_strategy="steps",
            save_steps=26,
            max_steps=34,
            logging_steps=1,
        )
        torch.manual_seed(0)
        return ImportanceTrainer(model=Slow(0.01, 0.15), args=args, train_dataset=data)

    def scored(trainer):
        # Uneven from step 4 on, so that the pool's size changes before and after the checkpoint, and flat at the end.
        def score(outputs, labels):
            step = trainer.state.global_step
            return skewed(outputs, labels) if 4 <= step < 30 else torch.ones(len(labels))

        trainer.compute_score_func = score
        return trainer

    whole = scored(build(tmp_path / "whole"))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-26"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]
    assert saved["clock"]["kappa"] == clock_of(whole).kappa != ASSUMED_KAPPA
    assert saved["clock"]["overhead"] == clock_of(whole).overhead is not None
    resumed = scored(build(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    keys = ("tau", "kappa", "price_presample", "active", "examples_scored", "examples_trained", "max_weight")
    histories = [
        [[e[f"importance/{key}"] for key in keys] for e in trainer.state.log_history if "loss" in e]
        for trainer in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    active = [entry[3] for entry in histories[0]]
    assert 0.0 in active
    assert 1.0 in active[26:]


@dataclass
class Timed(Presample):
    """Begins with measured times."""

    def begin(self, run):
        super().begin(run)
        run.clock.load(0.05, training=1.0)


def test_a_step_whose_scores_are_not_finite_is_no_step_on_few(tmp_path):
    args = auto(tmp_path, max_steps=30)
    trainer = ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(256), sampler=Timed())

    def score(outputs, labels):
        scores = skewed(outputs, labels)
        return scores * float("nan") if trainer.state.global_step % 3 == 2 else scores

    trainer.compute_score_func = score
    trainer.train()
    assert trainer.state.log_history[-2]["importance/nonfinite_steps"] > 5
    assert clock_of(trainer).overhead == 0.0  # a second an example was never taken
