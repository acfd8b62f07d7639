"""A resumed run is the run that was never interrupted, to the last bit.

With BERT, not ViT: transformers 5.23 saves ViT under older parameter names, and its Trainer's own resume then warns of
missing keys and goes on with random layers.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
import toys
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceTrainer
from hf_importance.checkpoint.state import VERSION


def scores_by_step(on_from, off_from):
    """Make a score function that is uneven in steps [on_from, off_from) and flat elsewhere."""

    def make(trainer):
        def score(outputs, labels):
            step = trainer.state.global_step
            uneven = 1.0 + (labels % 3).float()
            return uneven if on_from <= step < off_from else torch.ones(len(labels))

        return score

    return make


def build(tmp_path, data, make_score=None, kind=ImportanceTrainer, eval_dataset=None, dropout=0.1, **overrides):
    # What is measured differs from run to run; a given kappa does not.
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "logging_steps": 1, "kappa": 0.3}
    args = toys.always_on(tmp_path, **{**settings, **overrides})
    trainer = kind(model=toys.bert(dropout), args=args, train_dataset=data, eval_dataset=eval_dataset)
    if make_score is not None:
        trainer.compute_score_func = make_score(trainer)
    return trainer


def assert_same_parameters(one, other):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def place(trainer):
    """How far the stream was read."""
    return trainer._run.feed.state.stream


def check_resume(tmp_path, data, make_score=None, step=5, **overrides):
    whole = build(tmp_path / "whole", data, make_score, **overrides)
    whole.train()
    resumed = build(tmp_path / "resumed", data, make_score, **overrides)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_same_parameters(whole, resumed)
    timed = ("time_share", "kappa", "overhead", "_runtime", "_per_second")
    timeless = lambda e: {k: v for k, v in e.items() if not k.endswith(timed)}  # noqa: E731
    histories = [[timeless(e) for e in t.state.log_history if "train_loss" not in e] for t in (whole, resumed)]
    assert histories[0] == histories[1]
    return whole, resumed


PHASES = {
    "off": scores_by_step(99, 99),
    "on": None,
    "goes on after the checkpoint": scores_by_step(6, 99),
    "goes off after the checkpoint": scores_by_step(0, 7),
    "goes on at the checkpoint": scores_by_step(4, 99),
    "goes off at the checkpoint": scores_by_step(0, 4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_in_every_phase_of_the_switch(tmp_path, phase):
    whole, _ = check_resume(tmp_path, toys.sentences(128), PHASES[phase])
    switches = [e["importance/switches"] for e in whole.state.log_history if "loss" in e]
    assert switches[-1] == {"off": 0}.get(phase, 2 if "off" in phase else 1)


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_workers(tmp_path, workers, resampling):
    check_resume(tmp_path, toys.sentences(128), dataloader_num_workers=workers, resampling=resampling)


def test_in_the_middle_of_an_epoch_and_of_accumulation(tmp_path):
    # 7 batches an epoch in steps of 3, 3 and 1 micro-batches: step 5 ends inside the second epoch.
    check_resume(tmp_path, toys.sentences(100), gradient_accumulation_steps=3)


def test_at_the_end_of_an_epoch(tmp_path):
    check_resume(tmp_path, toys.sentences(80))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("phase", ["off", "on", "goes on at the checkpoint", "goes off after the checkpoint"])
def test_a_stream(tmp_path, phase, workers):
    # 40 batches: while on, a step takes 3 of them, so 10 steps end within the first pass.
    data = toys.sentences(640).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=64)
    whole, resumed = check_resume(tmp_path, data, PHASES[phase], dataloader_num_workers=workers)
    assert place(whole) == place(resumed)
    assert place(whole).passes == 0
    assert (place(whole).drawn == 10) is (phase == "off")


@pytest.mark.parametrize("step", [4, 6, 9])
def test_a_stream_that_is_started_over(tmp_path, step):
    # 8 batches a pass, 3 a step once on: the first pass ends with step 4, the second with step 7.
    data = toys.sentences(128).to_iterable_dataset().shuffle(seed=1, buffer_size=64)
    whole = build(tmp_path / "whole", data, save_steps=1)
    whole.train()
    resumed = build(tmp_path / "resumed", data, save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert place(whole) == place(resumed)
    assert place(whole).passes == 2
    assert_same_parameters(whole, resumed)


def test_ignore_data_skip_starts_the_stream_from_its_beginning(tmp_path):
    data = toys.sentences(640).to_iterable_dataset()
    build(tmp_path / "whole", data).train()
    resumed = build(tmp_path / "resumed", data, ignore_data_skip=True, save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert place(resumed).drawn == 5 * 3


def test_ignore_data_skip_starts_the_epoch_over_and_the_reserve_goes_on(tmp_path):
    data, seen = toys.sentences(128), {}
    for name, skip in {"exact": False, "from the beginning": True}.items():
        resumed = build(tmp_path / name, data, ignore_data_skip=skip)
        order = list(resumed.get_train_dataloader().batch_sampler)
        if not seen:
            resumed.train()
        pools = seen[name] = []
        resumed.compute_score_func = lambda o, y, pools=pools: pools.append(y) or torch.ones(len(y))
        resumed.train(resume_from_checkpoint=str(tmp_path / "exact" / "checkpoint-5"))
    exact, beginning = seen.values()
    assert torch.equal(beginning[0], data[order[0]]["labels"])
    assert torch.equal(exact[0], data[order[5]]["labels"])
    assert torch.equal(exact[1], beginning[1])  # the first batch of the reserve
    assert torch.equal(exact[2], beginning[2])


def test_the_best_model_and_the_limit_on_checkpoints(tmp_path):
    settings = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
        "max_steps": 12,
    }
    data, held_out = toys.sentences(128), toys.sentences(32, seed=1)
    whole = build(tmp_path / "whole", data, eval_dataset=held_out, **settings)
    whole.train()
    stopped = build(tmp_path / "resumed", data, eval_dataset=held_out, **settings)
    stopped.add_callback(StopAfter(5))
    stopped.train()
    resumed = build(tmp_path / "resumed", data, eval_dataset=held_out, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert_same_parameters(whole, resumed)
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "resumed").glob("checkpoint-*"))
    assert kept == sorted({whole.state.best_global_step, 12} | ({11} if whole.state.best_global_step == 12 else set()))


def test_a_subclass_that_makes_its_own_loader(tmp_path):
    class Own(ImportanceTrainer):
        def get_train_dataloader(self):
            return Trainer.get_train_dataloader(self)

    check_resume(tmp_path, toys.sentences(128), kind=Own)


class StopAfter(TrainerCallback):
    """Ends the run after a step, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_the_state_is_json_with_a_version(tmp_path):
    build(tmp_path, toys.sentences(128)).train()
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]
    assert saved["version"] == VERSION == 4
    assert saved["step"] == 5
    assert saved["sampler"]["settings"]["name"] == "Presample"
    assert saved["sampler"]["state"]["on"] is True
    assert saved["feed"]["reserve"] == 8  # steps 2 to 5, two batches each
    assert saved["totals"]["examples_trained"] == 80
    assert saved["table"] is None


def test_restored_callback_states_do_not_disturb(tmp_path):
    check_resume(tmp_path, toys.sentences(128), restore_callback_states_from_checkpoint=True)


def test_a_plain_trainers_checkpoint_starts_fresh_with_one_warning(tmp_path, caplog):
    data = toys.sentences(128)
    build(tmp_path, data, kind=Trainer).train()
    trainer = build(tmp_path, data)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert sum("not written by ImportanceTrainer" in r.getMessage() for r in caplog.records) == 1
    assert trainer.state.global_step == 10
    first = next(e for e in trainer.state.log_history if "importance/active_share" in e)
    assert (first["step"], first["importance/active_share"]) == (6, 0)
    build(tmp_path / "again", data).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_plain_trainer_resumes_from_ours(tmp_path):
    data = toys.sentences(128)
    build(tmp_path, data).train()
    trainer = build(tmp_path, data, kind=Trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 10


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (7, "has version 7, and this package knows versions up to 4; a newer hf_importance can resume it"),
        (1, "has version 1, that of an earlier hf_importance, and this one reads version 4 only"),
        (3, "has version 3, that of an earlier hf_importance, and this one reads version 4 only"),
    ],
)
def test_another_version_is_refused(tmp_path, version, message):
    data = toys.sentences(128)
    build(tmp_path, data).train()
    file: Path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]["version"] = version
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message) as raised:
        build(tmp_path, data).train(resume_from_checkpoint=str(file.parent))
    assert str(file) in str(raised.value)
    assert "resume from an older checkpoint, or delete the entry" in str(raised.value)


def test_a_checkpoint_of_version_1_is_refused_and_can_be_resumed_without_its_entry(tmp_path):
    data = toys.sentences(128)
    build(tmp_path, data).train()
    file: Path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(file.read_text())
    callbacks = state["stateful_callbacks"]
    callbacks["ImportanceStateCallback"]["attributes"]["importance"] = VERSION_1
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"version 1, .* delete the entry stateful_callbacks.ImportanceStateCallback"):
        build(tmp_path, data).train(resume_from_checkpoint=str(file.parent))
    del callbacks["ImportanceStateCallback"]
    file.write_text(json.dumps(state))
    trainer = build(tmp_path, data)
    trainer.train(resume_from_checkpoint=str(file.parent))
    assert trainer.state.global_step == 10


# What the first version wrote, at step 5.
VERSION_1 = {
    "version": 1,
    "step": 5,
    "switch": {"tau": 1.5, "active": True, "switches": 1},
    "variance": [0.5, 0.4, 0.3],
    "steps_on": 4,
    "totals": {"examples_scored": 0, "examples_trained": 80, "examples_saved": 0, "nonfinite_steps": 0},
    "reserve_position": 8,
    "kappa": 0.2,
    "stream": {"passes": 0, "drawn": 0},
    "loss_over_step": None,
    "history": None,
    "settings": {"importance_method": "presample", "importance_score": "upper_bound", "presample_ratio": 3.0},
}
