"""kappa is what scoring costs against training, data included; it is frozen, saved, and the same on all ranks."""

import json
import time

import pytest
import torch
import toys
from transformers import Trainer

from hf_importance import ImportanceTrainer
from hf_importance.costs import ASSUMED_KAPPA
from hf_importance.kappa import FEW_SAMPLES, SAMPLES, WARM_UP, KappaMeter

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
    return toys.arguments(tmp_path, presample_ratio="auto", logging_steps=1, **overrides)


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
    assert trainer._meter.mark() is None


@pytest.mark.parametrize(("overhead", "stays"), [(0.0, True), (0.4, True), (1.0, False)])
def test_what_does_not_shrink_with_the_batch_is_measured(tmp_path, digits, overhead, stays):
    # Scoring 20 of 16 a batch costs 0.2 of a step, keeping few nothing but the overhead.
    args = auto(tmp_path, importance_budget="constant_variance", max_steps=4 * PROBES)
    data = SlowData(digits.select(range(128)), 0.0)
    trainer = toys.run(ImportanceTrainer, Slow(0.02, 0.1, overhead), args, data, compute_score_func=skewed)
    assert trainer._meter.overhead == pytest.approx(overhead, abs=0.2)
    log = [e for e in trainer.state.log_history if "loss" in e]
    assert log[-1]["importance/overhead"] == trainer._meter.overhead
    assert max(e["importance/active"] for e in log) == 1
    assert bool(log[-1]["importance/active"]) == stays
    assert trainer._meter.mark(later=True) is None


def test_pools_are_held_against_the_last_whole_batches(tmp_path, digits):
    args = auto(tmp_path, importance_budget="constant_variance", max_steps=10 * PROBES)
    data = SlowData(digits.select(range(128)), 0.0)
    trainer = ImportanceTrainer(model=Slow(0.005, 0.025), args=args, train_dataset=data)

    def score(outputs, labels):
        # Once kappa is known the machine becomes four times as slow; six whole batches later it pays to presample.
        if trainer._meter.measured:
            trainer.model.seconds = (0.02, 0.1)
        return skewed(outputs, labels) if trainer.state.global_step >= 2 * PROBES + 2 else flat(outputs, labels)

    trainer.compute_score_func = score
    trainer.train()
    assert trainer._meter.overhead == pytest.approx(0.0, abs=0.2)
    assert trainer._meter.kappa == pytest.approx(1 / 6, rel=0.5)
    assert trainer.state.log_history[-2]["importance/active"] == 1


def test_it_is_not_measured_where_training_was_not(tmp_path, digits):
    meter = KappaMeter(torch.device("cpu"))
    meter.load(0.2)
    assert meter.mark(later=True) is None
    meter.load(0.2, training=0.01)
    assert meter.mark(later=True) is not None


def test_one_slow_batch_does_not_count():
    meter = KappaMeter(torch.device("cpu"))
    for batch in range(PROBES):
        for part, seconds in {"wait": 0.0, "score": 0.02, "train": 0.04}.items():
            assert not meter.ready
            mark = meter.mark()
            # The first of all is a warm-up, and one is slow for another reason.
            time.sleep(0.3 if part == "score" and batch in (0, 3) else seconds)
            meter.add(part, mark, 8)
    assert meter.ready
    presampling, training = meter.read()
    assert presampling / training == pytest.approx(0.5, rel=0.5)
    meter.settle(presampling, training)
    assert (meter.measured, meter.ready, meter.mark()) == (True, False, None)


def timed(meter, part, seconds, examples):
    meter.add(part, time.perf_counter() - seconds, examples)


def test_other_programs_that_slow_every_other_batch_do_not_count_on_a_cpu():
    meter = KappaMeter(torch.device("cpu"))
    for batch in range(PROBES):
        odd = batch % 2
        timed(meter, "wait", 0.0, 16)
        timed(meter, "score", 1.6 * (2.5 if odd else 1.0), 16)
        timed(meter, "train", 6.4 * (1.0 if odd else 2.5), 16)
    presampling, training = meter.read()
    assert presampling / training == pytest.approx(0.25, rel=0.01)


def test_a_machine_that_became_slower_changes_neither_kappa_nor_the_overhead():
    meter = KappaMeter(torch.device("cpu"))
    meter.settle(presampling=0.1, training=0.4)
    # All takes three times as long as then. Of a step of 16 examples 0.2 does not shrink.
    for _ in range(PROBES):
        timed(meter, "wait", 0.0, 16)
        timed(meter, "train", 3 * 16 * 0.4, 16)
    for _ in range(WARM_UP + FEW_SAMPLES):
        assert not meter.few_ready
        timed(meter, "pool wait", 0.0, 20)
        timed(meter, "pool", 3 * 20 * 0.1, 20)
        timed(meter, "few", 3 * 16 * 0.4 * (0.2 + 0.8 * 4 / 16), 4)
    assert meter.few_ready
    kappa, overhead = meter.read_few(batch_size=16)
    assert (kappa, overhead) == (pytest.approx(0.25, rel=0.01), pytest.approx(0.2, rel=0.01))
    meter.settle_few(kappa, overhead)
    assert not meter.few_ready


@pytest.mark.parametrize(("presampling", "kappa"), [(0.0, 0.001), (2.0, 0.99)])
def test_it_stays_between_0_and_1(presampling, kappa):
    meter = KappaMeter(torch.device("cpu"))
    meter.settle(presampling, 1.0)
    assert meter.kappa == kappa


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
    assert trainers[0]._meter.measured
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
            tau_threshold="auto",
            tau_momentum=0.8,
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
    assert saved["kappa"] == whole._meter.kappa != ASSUMED_KAPPA
    assert saved["overhead"] == whole._meter.overhead is not None
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


def test_a_step_whose_scores_are_not_finite_is_no_step_on_few(tmp_path):
    args = toys.arguments(tmp_path, presample_ratio="auto", max_steps=30)
    trainer = ImportanceTrainer(model=toys.bert(), args=args, train_dataset=toys.sentences(256))
    begin = trainer._begin_importance
    trainer._begin_importance = lambda: (begin(), trainer._meter.load(0.05, training=1.0))

    def score(outputs, labels):
        scores = skewed(outputs, labels)
        return scores * float("nan") if trainer.state.global_step % 3 == 2 else scores

    trainer.compute_score_func = score
    trainer.train()
    assert trainer.state.log_history[-2]["importance/nonfinite_steps"] > 5
    assert trainer._meter.overhead == 0.0  # a second an example was never taken
