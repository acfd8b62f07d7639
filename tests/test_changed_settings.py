"""Resuming with other settings than the run was saved with works, and says what it did with both values."""

import dataclasses
import logging
import math
import re

import pytest
import torch
import toys
from test_history import ALONE
from test_resume import build
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer

from hf_importance import ImportanceTrainer, Pool
from hf_importance.batches.pool import Padding
from hf_importance.batches.reserve import Population, ReserveDataset, reserve_sizes
from hf_importance.run.feed import Feed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build(folder, toys.sentences(128)).train()
    return str(folder / "checkpoint-5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presample_ratio": 4.0}, r"ratio was 3.0 and is 4.0: the reserve goes on behind the pools already drawn"),
        ({"per_device_train_batch_size": 8}, r"per_device_train_batch_size was 16 and is 8: .* not as many examples"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps was 1 and is 2: Trainer skips the batches"),
        ({"resampling": "multinomial"}, r"resampling was 'systematic' and is 'multinomial': it holds from the next s"),
        ({"importance_score": "loss"}, r"score was 'upper_bound' and is 'loss': tau forgets the old scores"),
        ({"momentum": 0.5}, r"momentum was 0.0 and is 0.5: it holds from the next step on"),
        ({"tau_threshold": 2.5}, r"threshold was 1.000000001 and is 2.5: it holds from the next step on"),
        (
            {"importance_method": "auto", "tau_threshold": None},
            r"was Presample and is Auto: it begins anew, off",
        ),
        ({"seed": 7}, r"seed was 42 and is 7: other examples are drawn, and this epoch has another order"),
        ({"examples": 192}, r"train_dataset length was 128 and is 192: this epoch has another order, .* twice"),
        ({"examples": 60}, r"train_dataset length was 128 and is 60: this epoch has another order"),
        ({"stream": True}, r"train_dataset length was 128 and is None: this epoch has another order"),
    ],
)
def test_it_goes_on_and_says_what_changed(tmp_path, saved, caplog, change, message):
    change = dict(change)
    data = toys.sentences(change.pop("examples", 128))
    data = data.to_iterable_dataset() if change.pop("stream", False) else data
    trainer = build(tmp_path, data, **change)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        trainer.train(resume_from_checkpoint=saved)
    found = [r for r in caplog.records if "other settings than it was saved with" in r.getMessage()]
    assert len(found) == 1
    assert re.search(message, found[0].getMessage()), found[0].getMessage()
    assert trainer.state.global_step == 10
    assert trainer._run.report.totals.examples_trained > 80  # the counts go on


def test_nothing_is_said_where_nothing_changed(tmp_path, saved, caplog):
    with caplog.at_level(logging.WARNING, "hf_importance"):
        build(tmp_path, toys.sentences(128)).train(resume_from_checkpoint=saved)
    assert not [r for r in caplog.records if "other settings" in r.getMessage()]


def test_several_changes_are_one_line(tmp_path, saved, caplog):
    trainer = build(tmp_path, toys.sentences(128), seed=7, presample_ratio=2.0)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        trainer.train(resume_from_checkpoint=saved)
    (record,) = [r for r in caplog.records if "other settings" in r.getMessage()]
    assert "ratio was 3.0 and is 2.0" in record.getMessage()
    assert "seed was 42 and is 7" in record.getMessage()


def test_with_a_dataset_that_shrank_below_a_pool_it_is_off(tmp_path, saved, caplog):
    ours, plain = (
        build(tmp_path / kind.__name__, toys.sentences(40), kind=kind) for kind in (ImportanceTrainer, Trainer)
    )
    for trainer in (ours, plain):
        trainer.train(resume_from_checkpoint=saved)
    assert "train_dataset has 40 examples, fewer than the pool of 48" in toys.reason(caplog)
    assert ours.state.global_step == 10
    toys.same_run(ours, plain)


@pytest.mark.parametrize(
    ("old", "new", "position", "expected"),
    [
        ((3.0, 16), (3.0, 16), 8, 8),  # 2 batches a pool
        ((3.0, 16), (5.0, 16), 8, 16),  # 4 pools: 4 batches each from now on
        ((5.0, 16), (3.0, 16), 8, 4),
        ((3.0, 16), (3.0, 8), 8, 8),  # smaller batches, as many of them
        ((2.5, 8), (1.5, 8), 7, 4),  # 12 examples in 2 batches; a pool that was broken off counts as drawn
    ],
)
def test_the_reserve_goes_on_behind_the_pools_that_were_drawn(old, new, position, expected):
    def pool(ratio, batch):
        return Pool(math.ceil(ratio * batch), batch)

    def reserve(batch):
        loader = DataLoader([{"x": torch.tensor(i)} for i in range(200)], batch)
        return Feed(loader, ALONE, Padding(), 7, batch, 1, 1, None, lambda: 0, Population(200))

    before, after = reserve(old[1]), reserve(new[1])
    before.rest_of(pool(*old), iter(()))
    after.load(dataclasses.replace(before.where(), reserve=position), {}, False, "")
    found = after.rest_of(pool(*new), iter(()))
    sizes = reserve_sizes(new[1], math.ceil(new[0] * new[1]), 200)
    assert after.where().reserve == expected + len(sizes)
    whole = ReserveDataset(after.loader.dataset, default_collate, sizes, 7, 0)
    assert found[0]["x"].tolist() == whole.indices(expected, len(sizes))


def test_without_importance_sampling_in_between_it_starts_fresh(tmp_path, saved, caplog):
    data = toys.sentences(128)
    build(tmp_path, data, importance_sampling=False).train(resume_from_checkpoint=saved)
    with caplog.at_level(logging.WARNING, "hf_importance"):
        build(tmp_path, data, max_steps=11).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert sum("state in it is that of step 5" in r.getMessage() for r in caplog.records) == 1
