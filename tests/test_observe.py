"""``importance_method="observe"``: the plain Trainer to the last bit, and what importance sampling would save."""

import pytest
import toys
from test_auto import EXAMPLES, STEPS, even, forgetful, persistent
from test_off_is_exact import same_run
from transformers import Trainer

from hf_importance import ImportanceTrainer
from hf_importance.theory.costs import OFF_ABOVE, ON_BELOW

WOULD_BE = ("importance/would_be_on_share", "importance/would_be_compute", "importance/would_be_on_from_step")


def arguments(folder, **overrides):
    settings = {"importance_method": "observe", "max_steps": 3 * STEPS, "logging_steps": 1, **overrides}
    return toys.arguments(folder, **settings)


def noisy():
    """Sentences of which one in twelve has any class: most are soon learnt, a few never."""
    data = toys.sentences(EXAMPLES)
    labels = data["labels"][:].clone()
    labels[::12] = (labels[::12] + 1) % 4
    return data.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def bert():
    model = toys.bert(dropout=0.1)
    model.accepts_loss_kwargs = False  # else plain Trainer multiplies the loss by the number of micro-batches
    return model


def observed(folder, score=None, data=None, resume=None, **overrides):
    """Train; give the trainer and what ``train()`` returned."""
    trainer = ImportanceTrainer(
        model=bert(),
        args=arguments(folder, **overrides),
        train_dataset=noisy() if data is None else data,
        compute_score_func=score,
    )
    return trainer, trainer.train(resume_from_checkpoint=resume).metrics


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def said(capsys):
    """What a run has printed of what would have been."""
    (sentence,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Observed"))
    return sentence


def would_be(entry):
    return {name: entry[name] for name in WOULD_BE if name in entry}


# ---- It is the plain Trainer ----


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": 0.05},
        {"kappa": 0.05, "gradient_accumulation_steps": 2},
        # Measured, with scoring passes that leave no trace.
        {"gradient_accumulation_steps": 2},
        {"kappa": 0.05, "dataloader_num_workers": 2},
    ],
)
def test_it_is_the_plain_trainer(tmp_path, settings):
    trainers, streams = [], []
    for kind in (ImportanceTrainer, Trainer):
        recorder = toys.Recorder()
        args = arguments(tmp_path, **settings)
        trainers.append(toys.run(kind, bert(), args, noisy(), callbacks=[recorder]))
        streams.append(recorder.streams)
    same_run(*trainers, *streams)
    ours = logged(trainers[0])[-1]
    assert (ours["importance/active"], ours["importance/switches"], ours["importance/examples_scored"]) == (0, 0, 0)
    # Not because there was nothing to win.
    assert "kappa" not in settings or ours["importance/would_be_on_share"] > 0


def test_random_augmentation_and_batch_norm_see_nothing_of_it(tmp_path, digits):
    data = toys.Augmented(digits.select(range(128)))
    trainers, streams = [], []
    for kind in (ImportanceTrainer, Trainer):
        recorder = toys.Recorder()
        args = arguments(tmp_path, max_steps=STEPS)
        trainers.append(toys.run(kind, toys.resnet(), args, data, callbacks=[recorder]))
        streams.append(recorder.streams)
    same_run(*trainers, *streams)
    assert trainers[0].sampler.run.clock.measured


# ---- What it says ----


def test_where_it_would_pay_it_says_by_how_much(tmp_path, capsys):
    trainer, metrics = observed(tmp_path, kappa=0.05, importance_budget="constant_variance")
    found, entries = would_be(metrics), logged(trainer)
    assert set(found) == set(WOULD_BE)
    assert would_be(entries[-1]) == found
    assert 0 < found["importance/would_be_on_share"] < 1
    assert 0 < found["importance/would_be_compute"] < 1
    first = found["importance/would_be_on_from_step"]
    assert [WOULD_BE[2] in entry for entry in entries] == [step >= first for step in range(1, 3 * STEPS + 1)]
    assert metrics["importance/steps_on"] == metrics["importance/examples_scored"] == 0
    sentence = said(capsys)
    assert f"would have been on from step {first}" in sentence
    assert f"for {found['importance/would_be_compute']:.0%} of the compute of uniform steps" in sentence
    steps = round(found["importance/would_be_on_share"] * 3 * STEPS)
    assert f"Observed {3 * STEPS} steps" in sentence and f"in {steps} steps" in sentence


def test_the_compute_is_the_mean_of_the_prices(tmp_path, capsys):
    # Nothing worth remembering, so all prices are those of presampling, which the log has.
    trainer, metrics = observed(tmp_path, forgetful, kappa=0.05, importance_budget="constant_variance")
    on, costs = False, []
    for entry in logged(trainer):
        price = entry["importance/price_presample"]
        on = price < (OFF_ABOVE if on else ON_BELOW)
        costs.append(price if on else 1.0)
    assert metrics["importance/would_be_compute"] == pytest.approx(sum(costs) / len(costs))
    assert metrics["importance/would_be_compute"] < 0.5
    assert metrics["importance/would_be_on_share"] == sum(cost < 1 for cost in costs) / len(costs)
    assert "by presampling, for" in said(capsys)


def test_memory_alone_is_named_where_scoring_is_dear(tmp_path, capsys):
    _, metrics = observed(tmp_path, persistent, kappa=0.8, importance_budget="constant_variance")
    assert metrics["importance/would_be_compute"] < 1
    assert metrics["importance/would_be_on_from_step"] > STEPS  # once there is something to remember
    assert "by history, for" in said(capsys)


def test_where_it_would_not_pay_it_says_so(tmp_path, capsys):
    trainer, metrics = observed(tmp_path, even, kappa=0.1)
    expected = {"importance/would_be_on_share": 0.0, "importance/would_be_compute": 1.0}
    assert would_be(metrics) == would_be(logged(trainer)[-1]) == expected
    sentence = said(capsys)
    assert f"Observed {3 * STEPS} steps: importance sampling would have stayed off (tau 1.00" in sentence


# ---- Checkpoints, streams ----


@pytest.mark.parametrize(("score", "accumulation"), [(None, 1), (None, 2), (persistent, 1)])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, score, accumulation):
    settings = {"kappa": 0.05, "importance_budget": "constant_variance", "gradient_accumulation_steps": accumulation}
    settings |= {"save_strategy": "steps", "save_steps": 17}
    whole, metrics = observed(tmp_path / "whole", score, **settings)
    for step in (17, 34):
        folder = str(tmp_path / f"whole/checkpoint-{step}")
        resumed, theirs = observed(tmp_path / f"{step}", score, resume=folder, **settings)
        assert would_be(metrics) == would_be(theirs) and len(would_be(metrics)) == 3
        assert [toys.own(e) | would_be(e) for e in logged(whole)] == [
            toys.own(e) | would_be(e) for e in logged(resumed)
        ]
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert one.equal(other)


def test_of_a_stream_it_says_what_presampling_would_save(tmp_path, caplog, capsys):
    ends = []
    for method in ("observe", None):
        settings = {"max_steps": 3 * STEPS, "logging_steps": 4, "kappa": 0.05}
        kind = ImportanceTrainer if method else Trainer
        args = arguments(tmp_path, **settings, importance_budget="constant_variance")
        extra = {"compute_score_func": forgetful} if method else {}
        ends.append(toys.run(kind, bert(), args, noisy().to_iterable_dataset(), **extra))
    for one, other in zip(*(trainer.model.parameters() for trainer in ends), strict=True):
        assert one.equal(other)
    found = would_be(logged(ends[0])[-1])
    assert found["importance/would_be_compute"] < 1 and found["importance/would_be_on_from_step"] >= 1
    assert "chooses between presampling and uniform steps only" in caplog.text
    assert "by presampling, for" in said(capsys)
