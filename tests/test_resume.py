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
from transformers import Trainer

from hf_importance import ImportanceTrainer


def scores_by_step(on_from, off_from):
    """Make a score function that is uneven in steps [on_from, off_from) and flat elsewhere."""

    def make(trainer):
        def score(outputs, labels):
            step = trainer.state.global_step
            uneven = 1.0 + (labels % 3).float()
            return uneven if on_from <= step < off_from else torch.ones(len(labels))

        return score

    return make


def build(tmp_path, data, make_score=None, kind=ImportanceTrainer, **overrides):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "logging_steps": 1}
    args = toys.always_on(tmp_path, **{**settings, **overrides})
    trainer = kind(model=toys.bert(dropout=0.1), args=args, train_dataset=data)
    if make_score is not None:
        trainer.compute_score_func = make_score(trainer)
    return trainer


def check_resume(tmp_path, data, make_score=None, **overrides):
    whole = build(tmp_path / "whole", data, make_score, **overrides)
    whole.train()
    resumed = build(tmp_path / "resumed", data, make_score, **overrides)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    timed = ("time_share", "kappa", "_runtime", "_per_second")
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


def test_a_stream(tmp_path):
    # Off at the checkpoint: the stream is then exactly as far as the Trainer believes.
    check_resume(tmp_path, toys.sentences(128).to_iterable_dataset(), scores_by_step(99, 99))


def test_the_state_is_json_with_a_version(tmp_path):
    build(tmp_path, toys.sentences(128)).train()
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]
    assert saved["version"] == 1
    assert saved["switch"]["active"] is True
    assert saved["reserve_position"] == 8  # steps 2 to 5, two batches each
    assert saved["totals"]["examples_trained"] == 80


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


def test_a_newer_version_is_refused(tmp_path):
    data = toys.sentences(128)
    build(tmp_path, data).train()
    file: Path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]["version"] = 7
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="has version 7, and this package knows versions up to 1"):
        build(tmp_path, data).train(resume_from_checkpoint=str(file.parent))
