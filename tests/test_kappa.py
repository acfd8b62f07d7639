"""kappa is what scoring costs against training: of pairs in the whole run, saved, the same on all ranks."""

import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch
import toys
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceTrainer
from hf_importance.ranks import Ranks
from hf_importance.run.clock import FEWEST_PAIRS, PAIR_EVERY, PAIRS, Clock
from hf_importance.theory.costs import ASSUMED_KAPPA


class Work:
    """A time that passes as it is told, in multiples of 2 ** -12, so that differences are exact; it counts looks."""

    def __init__(self):
        self.now, self.looks = 1.0, 0

    def look(self):
        self.looks += 1
        return self.now

    def take(self, seconds):
        self.now += round(seconds * 2**12) / 2**12


@pytest.fixture
def work(monkeypatch):
    found = Work()
    monkeypatch.setattr("hf_importance.transfer.time", SimpleNamespace(process_time=found.look))
    return found


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, work, seconds):
        ctx.work, ctx.seconds = work, seconds
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.work.take(ctx.seconds)
        return gradient, None, None


class Timed(torch.nn.Module):
    """A classifier whose forward and backward pass take known times for 16 examples, and of fewer this share at least.

    The rest shrinks in proportion.
    """

    loss_type = "ForSequenceClassification"

    def __init__(self, work, forward, backward, overhead=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)
        self.work, self.seconds, self.overhead = work, lambda: (forward, backward), overhead

    def forward(self, pixel_values, labels=None):
        share = self.overhead + (1 - self.overhead) * len(pixel_values) / 16
        forward, backward = self.seconds()
        self.work.take(forward * share)
        logits = self.layer(pixel_values.flatten(1))
        if torch.is_grad_enabled():
            logits = Backward.apply(logits, self.work, backward * share)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Data(torch.utils.data.Dataset):
    """Digits, each of which takes time to load."""

    def __init__(self, data, work, seconds=0.0):
        self.data, self.work, self.seconds = [data[i] for i in range(len(data))], work, seconds

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.work.take(self.seconds)
        return self.data[index]


def flat(outputs, labels):
    return torch.ones(len(labels))


def skewed(outputs, labels):
    return (torch.arange(len(labels)) % 8 == 0).float()


def auto(tmp_path, **overrides):
    return toys.arguments(tmp_path, presample_ratio="auto", tau_threshold=None, logging_steps=1, **overrides)


def clock_of(trainer):
    return trainer.sampler.run.clock


def log_of(trainer):
    return [e for e in trainer.state.log_history if "loss" in e]


# ---- What is measured ----


@pytest.mark.parametrize(
    ("forward", "backward", "load", "expected"),
    [
        (1.0, 2.0, 0.0, 1 / 3),
        (1.0, 9.0, 0.0, 0.1),
        # 16 examples a batch: 4 for loading it, whatever is then done with it.
        (1.0, 2.0, 0.25, (4 + 1) / (4 + 3)),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_measured_while_off_data_included(
    tmp_path, digits, work, forward, backward, load, expected, accumulation
):
    data = Data(digits.select(range(128)), work, load)
    args = auto(tmp_path, max_steps=FEWEST_PAIRS + 2, gradient_accumulation_steps=accumulation)
    trainer = toys.run(ImportanceTrainer, Timed(work, forward, backward), args, data, compute_score_func=flat)
    logged = [e["importance/kappa"] for e in log_of(trainer)]
    assert logged[: FEWEST_PAIRS - 1] == [ASSUMED_KAPPA] * (FEWEST_PAIRS - 1)
    assert logged[FEWEST_PAIRS - 1 :] == [pytest.approx(expected)] * 3
    last = log_of(trainer)[-1]
    assert last["importance/price_presample"] == pytest.approx(1 + logged[-1], rel=0.3)  # all scores are alike
    assert "importance/tau_threshold" not in last
    assert last["importance/examples_scored"] == 0  # a probe is no pool


def test_it_is_measured_while_on_where_nothing_waits_for_it(tmp_path, digits, work):
    args = toys.always_on(tmp_path, max_steps=FEWEST_PAIRS + 3, logging_steps=1)
    data = Data(digits.select(range(128)), work)
    trainer = toys.run(ImportanceTrainer, Timed(work, 1.0, 2.0), args, data, compute_score_func=skewed)
    logged = [e["importance/kappa"] for e in log_of(trainer)]
    # The first step is uniform, and not timed. Then scoring 48 takes three passes of 1 for 16.
    assert logged == [ASSUMED_KAPPA] * FEWEST_PAIRS + [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize(("overhead", "stays"), [(0.0, True), (0.4, True), (1.0, False)])
def test_what_does_not_shrink_with_the_batch_is_measured(tmp_path, digits, work, overhead, stays):
    # Scoring 20 of 16 a batch costs 0.2 of a step, keeping few nothing but the overhead.
    args = auto(tmp_path, importance_budget="constant_variance", max_steps=40)
    data = Data(digits.select(range(128)), work)
    trainer = toys.run(ImportanceTrainer, Timed(work, 1.0, 5.0, overhead), args, data, compute_score_func=skewed)
    assert clock_of(trainer).overhead == pytest.approx(overhead, abs=0.02)
    log = log_of(trainer)
    assert log[-1]["importance/overhead"] == clock_of(trainer).overhead
    assert max(e["importance/active"] for e in log) == 1
    assert bool(log[-1]["importance/active"]) == stays


def test_time_in_which_the_process_does_not_run_does_not_count(tmp_path, digits):
    class Sleepy(torch.nn.Module):
        """Computes, and while it scores waits for its turn: by the wall clock scoring would cost all."""

        loss_type = "ForSequenceClassification"

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, pixel_values, labels=None):
            for _ in range(20 if torch.is_grad_enabled() else 5):
                torch.rand(200, 200) @ torch.rand(200, 200)
            time.sleep(0.0 if torch.is_grad_enabled() else 0.1)
            logits = self.layer(pixel_values.flatten(1))
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    args = auto(tmp_path, max_steps=FEWEST_PAIRS + 1)
    trainer = toys.run(ImportanceTrainer, Sleepy(), args, digits.select(range(128)), compute_score_func=flat)
    assert clock_of(trainer).measured and 0.05 < clock_of(trainer).kappa < 0.7


# ---- As long as it trains ----


@pytest.mark.parametrize("on", [False, True])
def test_a_change_of_cost_in_mid_run_is_followed(tmp_path, digits, work, on):
    steps, change = (400, 100) if not on else (400, 150)
    # Its scores go by the place in the batch, which training does not find again.
    args = auto(tmp_path, importance_budget="constant_variance", max_steps=steps, calibrate=False)
    data = Data(digits.select(range(128)), work)
    trainer = ImportanceTrainer(model=Timed(work, 1.0, 9.0), args=args, train_dataset=data)
    # From here on all takes twice as long, and scoring four times; or as of other lengths of inputs.
    trainer.model.seconds = lambda: (1.0, 9.0) if trainer.state.global_step < change else (4.0, 16.0)
    trainer.compute_score_func = skewed if on else flat
    trainer.train()
    log = log_of(trainer)
    assert log[change - 1]["importance/kappa"] == pytest.approx(0.1, rel=0.02)
    # The median of nine pairs changes with the fifth.
    follows = change + (PAIRS // 2 + 1) * (PAIR_EVERY if on else 20) + 1
    assert log[follows]["importance/kappa"] == log[-1]["importance/kappa"] == pytest.approx(0.2, rel=0.02)
    assert log[-1]["importance/active"] == on


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_change_of_cost_is_followed_while_memory_draws(tmp_path, digits, work, accumulation):
    change, kinds = 150, []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kinds.append(trainer.sampler.source if trainer.sampler.active else None)

    args = toys.arguments(
        tmp_path, importance_method="auto", importance_budget="constant_variance", tau_threshold=None, max_steps=400,
        logging_steps=1, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    # A class in ten has ten times the score of the others, so that memory knows whose.
    trainer = ImportanceTrainer(
        model=Timed(work, 1.0, 9.0), args=args, train_dataset=Data(digits.select(range(128)), work),
        compute_score_func=lambda outputs, labels: 1.0 + 9.0 * (labels == 0), callbacks=[Note()],
    )  # fmt: skip
    trainer.model.seconds = lambda: (1.0, 9.0) if trainer.state.global_step < change else (4.0, 16.0)
    trainer.train()
    log = log_of(trainer)
    assert log[change - 1]["importance/kappa"] == pytest.approx(0.1, rel=0.02)
    follows = change + (PAIRS // 2 + 1) * max(20 // accumulation, PAIR_EVERY) + 1
    assert log[follows]["importance/kappa"] == log[-1]["importance/kappa"] == pytest.approx(0.2, rel=0.02)
    assert set(kinds[change:follows]) == {"history"}


class Steps:
    """Steps of 16 examples whose parts take as long as they are told."""

    def __init__(self, work):
        self.work, self.step, self.probes = work, 0, 0
        self.clock = Clock(torch.device("cpu"), Ranks(Accelerator(cpu=True)))

    def _score(self, seconds):
        self.work.take(seconds)
        self.probes += 1
        return 16

    def _train(self, seconds, examples):
        clock = self.clock
        with clock.training_on({"labels": torch.zeros(examples)}):
            self.work.take(seconds)
        clock.learn(self.step, clock.times, clock.read(clock.times))
        self.step += 1

    def uniform(self, score, train):
        self.clock.begin_step()
        self.clock.probe(self.step, 16, lambda: self._score(score))
        self._train(train, 16)

    def by_pool(self, score, train, pool=20, kept=4, probe=0.0):
        self.clock.begin_step()
        with self.clock.scoring(self.step, pool, 16, kept / 16, lambda: self._score(probe)):
            self.work.take(score)
        self._train(train, kept)


@pytest.fixture
def steps(work):
    return Steps(work)


@pytest.mark.parametrize("kappa", [0.05, 0.2, 1 / 3, 0.6])
def test_probes_cost_less_than_a_percent_of_a_run_that_stays_off(steps, kappa):
    for _ in range(2000):
        steps.uniform(score=kappa, train=1.0)
    assert steps.clock.kappa == pytest.approx(kappa, abs=1e-3)
    assert steps.probes * kappa <= 0.005 * 2000 + FEWEST_PAIRS * kappa < 0.01 * 2000
    assert steps.probes > PAIRS  # and it goes on


def test_one_slow_batch_in_two_does_not_count(steps):
    for batch in range(FEWEST_PAIRS):
        assert not steps.clock.measured
        steps.uniform(score=30.0 if batch in (0, 3) else 2.0, train=4.0)
    assert steps.clock.kappa == pytest.approx(0.5)


@pytest.mark.parametrize(("scoring", "kappa"), [(0.0, 0.001), (2.0, 0.99)])
def test_it_stays_between_0_and_1(steps, scoring, kappa):
    for _ in range(FEWEST_PAIRS):
        steps.uniform(score=scoring, train=1.0)
    assert steps.clock.kappa == kappa


def test_pools_say_what_scoring_takes_and_the_overhead_whatever_the_load(steps):
    for _ in range(40):
        steps.uniform(score=1.0, train=4.0)
    assert (steps.clock.kappa, steps.clock.overhead) == (0.25, None)
    # Of a step of 16 examples 0.2 does not shrink; scoring in pools takes 0.3 of training. The machine is slower than
    # it was, and otherwise in each step.
    probes = steps.probes
    for slower in range(PAIRS):
        assert steps.clock.overhead is None
        whole = 4.0 * (2 + slower % 3)
        steps.by_pool(score=20 * 0.3 * whole / 16, train=whole * (0.2 + 0.8 * 4 / 16), probe=whole / 4)
    assert (steps.clock.kappa, steps.clock.overhead) == (pytest.approx(0.3, rel=0.01), pytest.approx(0.2, rel=0.01))
    # From there on the pools alone say how both change: all takes half as long, and scoring a quarter.
    for _ in range(PAIRS * PAIR_EVERY):
        steps.by_pool(score=20 * 0.15 * 6 / 16, train=6 * (0.2 + 0.8 * 8 / 16), kept=8)
    assert (steps.clock.kappa, steps.clock.overhead) == (pytest.approx(0.15, rel=0.01), pytest.approx(0.2, rel=0.01))
    assert steps.probes == probes + PAIRS
    # Off and on again: what pools take over single batches stays known, and the overhead is measured anew.
    for _ in range(PAIRS * 40):
        steps.uniform(score=0.5, train=4.0)
    assert steps.clock.kappa == pytest.approx(0.125 * 0.3 / 0.25, rel=0.01)
    for _ in range(PAIRS):
        steps.by_pool(score=20 * 0.3 * 4 / 16, train=4 * (0.5 + 0.5 * 4 / 16), probe=0.5)
    assert (steps.clock.kappa, steps.clock.overhead) == (pytest.approx(0.3, rel=0.01), pytest.approx(0.5, rel=0.01))


def test_probes_cost_little_more_than_a_percent_of_a_run_that_goes_on_and_off(steps):
    for step in range(3000):
        if step % 20 < 10:
            steps.uniform(score=1 / 3, train=1.0)
        else:
            steps.by_pool(score=20 / 48, train=0.25, probe=1 / 3)
    assert steps.probes / 3 <= (0.005 + 0.005) * 3000 + (FEWEST_PAIRS + PAIRS) / 3 < 0.012 * 3000


def test_nobody_looks_at_the_time_where_it_is_given(steps):
    steps.clock.give(0.2)
    for _ in range(3):
        steps.uniform(score=1.0, train=1.0)
        steps.by_pool(score=1.0, train=1.0)
    assert (steps.clock.kappa, steps.clock.measured, steps.work.looks, steps.probes) == (0.2, True, 0, 0)


@pytest.mark.parametrize(
    ("settings", "looks"),
    [
        # When a step begins nobody knows yet whether it is on.
        ({"presample_ratio": 3.0, "tau_threshold": 3.9}, 8),
        ({"presample_ratio": "auto", "kappa": 0.9}, 0),
    ],
)
def test_no_probe_where_no_decision_waits_for_it(tmp_path, digits, work, settings, looks):
    model, calls = toys.vit(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    args = toys.arguments(tmp_path, importance_budget="constant_variance", **{"tau_threshold": None, **settings})
    toys.run(ImportanceTrainer, model, args, digits.select(range(100)))
    assert (len(calls), work.looks) == (8, looks)


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


# ---- Resuming ----


def uneven(trainer):
    """Give costs and scores that change from step to step, and over the run."""

    def seconds():
        step = trainer.state.global_step
        return 1.0 + step % 3 / 4, 12.0 - step % 5 / 2 - (3.0 if step > 50 else 0.0)

    def score(outputs, labels):
        step = trainer.state.global_step
        return skewed(outputs, labels) if 4 <= step < 40 or step >= 60 else 1.0 + labels % 2 / 2

    trainer.model.seconds, trainer.compute_score_func = seconds, score


def timeless(trainer):
    """Give the whole log but for what the machine took, and the Trainer's own mean since it was started."""
    others = ("scoring_time_share", "scoring_seconds", "_runtime", "_per_second", "train_loss")
    return [{k: v for k, v in e.items() if not k.endswith(others)} for e in trainer.state.log_history]


SETTINGS = {
    "presample": {"presample_ratio": "auto", "importance_budget": "constant_variance", "momentum": 0.8},
    "auto": {"importance_method": "auto", "importance_budget": "constant_variance", "momentum": 0.8},
    "observe": {"importance_method": "observe", "importance_budget": "constant_variance"},
}
# Before kappa is known; before and after steps by importance begin; where few of them were timed; later.
CHECKPOINTS = (2, 4, 8, 14, 32, 62, 78)


def quick(method, accumulation):
    """Two of six, of 8 to 13 s each."""
    return (method, accumulation) in (("presample", 1), ("auto", 2))


@pytest.mark.parametrize(("method", "accumulation"), toys.slow_but(quick, itertools.product(SETTINGS, (1, 2))))
def test_a_resumed_run_measures_and_decides_the_same(tmp_path, digits, work, method, accumulation):
    data = Data(digits.select(range(320)), work)

    def train(folder, resume=None):
        args = toys.arguments(
            folder, **{"tau_threshold": None, **SETTINGS[method]}, save_strategy="steps", save_steps=2, max_steps=96,
            logging_steps=1, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer = ImportanceTrainer(model=Timed(work, 1.0, 12.0, 0.125), args=args, train_dataset=data)
        uneven(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    state = json.loads((tmp_path / "whole/checkpoint-78/trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]["clock"]
    log = timeless(whole)
    kappas = [e["importance/kappa"] for e in log if "importance/kappa" in e]
    assert kappas[:4] == [ASSUMED_KAPPA] * 4 and len(set(kappas)) >= 3
    if method != "observe":
        assert saved["overhead"] is not None and {0.0, 1.0} <= {e.get("importance/active") for e in log}
    for step in CHECKPOINTS:
        resumed = train(tmp_path / f"{step}", str(tmp_path / f"whole/checkpoint-{step}"))
        assert log == timeless(resumed)
        assert vars(clock_of(whole).state) == vars(clock_of(resumed).state)
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_step_whose_scores_are_not_finite_is_no_step_on_few(tmp_path, digits, work):
    args = auto(tmp_path, max_steps=40, importance_budget="constant_variance")
    data = Data(digits.select(range(128)), work)
    trainer = ImportanceTrainer(model=Timed(work, 1.0, 9.0), args=args, train_dataset=data)

    def score(outputs, labels):
        scores = skewed(outputs, labels)
        return scores * float("nan") if trainer.state.global_step % 3 == 2 else scores

    trainer.compute_score_func = score
    trainer.train()
    assert log_of(trainer)[-1]["importance/nonfinite_steps"] > 5
    assert clock_of(trainer).overhead == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("method", ["paper", "presample"])
def test_saving_changes_nothing_that_is_measured(tmp_path, digits, work, method):
    found = []
    for saving in ({"save_strategy": "steps", "save_steps": 1}, {}):
        settings = {"paper": {"tau_threshold": 1.2}, "presample": SETTINGS["presample"] | {"tau_threshold": None}}
        args = toys.arguments(tmp_path, max_steps=20, logging_steps=20, **settings[method], **saving)
        trainer = ImportanceTrainer(Timed(work, 1.0, 12.0), args, train_dataset=Data(digits.select(range(320)), work))
        uneven(trainer)
        trainer.train()
        found.append((vars(clock_of(trainer).state), log_of(trainer)[-1]["importance/active"]))
    assert found[0] == found[1] and found[0][1] == 1 and len(found[0][0]["pairs"]) >= FEWEST_PAIRS
