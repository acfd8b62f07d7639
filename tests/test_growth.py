"""A long run holds no more memory, file handles or threads at its end than at its start, and nothing behind it."""

import gc
import os
import threading
import time
import weakref
from pathlib import Path

import pytest
import toys
from test_history_training import uneven
from test_resume import build
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceTrainer

PAGE = os.sysconf("SC_PAGE_SIZE")


def resources():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
    return {
        "resident MB": resident,
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
    }


class Watch(TrainerCallback):
    """Looks at the process every so many steps."""

    def __init__(self, every):
        self.every, self.seen = every, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.seen[state.global_step] = resources()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("steps", "workers", "megabytes"),
    [
        (300, 0, 8),
        pytest.param(10_000, 0, 16, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(1_000, 1, 16, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_long_run_does_not_grow(tmp_path, steps, workers, megabytes):
    watch = Watch(steps // 10)

    def flapping(trainer):
        # 3 steps uneven, 3 flat.
        return lambda outputs, labels: 1.0 + (labels % 3).float() * (trainer.state.global_step // 3 % 2 == 0)

    # 100 steps an epoch; a log entry of every switch is kept by the Trainer, some 150 bytes each.
    trainer = build(
        tmp_path,
        toys.sentences(1600),
        flapping,
        max_steps=steps,
        logging_steps=steps // 10,
        save_steps=steps // 10,
        save_total_limit=2,
        dataloader_num_workers=workers,
    )
    trainer.add_callback(watch)
    trainer.train()
    print({step: {name: round(value, 1) for name, value in found.items()} for step, found in watch.seen.items()})
    assert trainer._run.state.switches >= steps // 3 - 1
    warm, end = watch.seen[steps // 10 * 2], watch.seen[steps]
    assert end["file handles"] <= warm["file handles"]
    assert end["threads"] <= warm["threads"]
    assert end["Python threads"] <= warm["Python threads"]
    assert end["resident MB"] <= warm["resident MB"] + megabytes


ON = {"presample_ratio": 3.0, "tau_threshold": 1.0 + 1e-9, "momentum": 0.0, "max_steps": 12}
REMEMBERING = {"importance_budget": "constant_variance", "max_steps": 60, "logging_steps": 20}
RUNS = {
    "plain": {"max_steps": 12},
    "off": {"importance_sampling": False, "max_steps": 12},
    "presample": ON,
    "history": {"importance_method": "history", **REMEMBERING},
    "auto": {"importance_method": "auto", "kappa": 0.2, **REMEMBERING},
    "observe": {"importance_method": "observe", "kappa": 0.2, **REMEMBERING},
}


def trained(folder, name, callbacks=(), **overrides):
    """A trainer after its run, by importance at its end where the method ever is."""
    kind, scores = (Trainer, {}) if name == "plain" else (ImportanceTrainer, {"compute_score_func": uneven})
    args = toys.arguments(folder, **RUNS[name], **overrides)
    data = toys.sentences(256)
    trainer = kind(model=toys.bert(), args=args, train_dataset=data, callbacks=list(callbacks), **scores)
    trainer.train()
    if name in ("presample", "history", "auto"):
        assert trainer.sampler.active
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_deleted_trainer_frees_its_model_at_once(tmp_path, name, workers):
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer = trained(tmp_path, name, dataloader_num_workers=workers, **saving)
    model = weakref.ref(trainer.model)
    gc.disable()  # what the collector would find is not free yet
    try:
        del trainer
        assert model() is None
    finally:
        gc.enable()


def test_a_trainer_that_never_trained_frees_its_model_at_once(tmp_path):
    trainer = ImportanceTrainer(toys.bert(), toys.arguments(tmp_path), train_dataset=toys.sentences())
    model = weakref.ref(trainer.model)
    gc.disable()
    try:
        del trainer
        assert model() is None
    finally:
        gc.enable()


class LastStep(TrainerCallback):
    """When the last step ended."""

    def on_step_end(self, args, state, control, **kwargs):
        self.time = time.perf_counter()


def test_the_end_of_a_run_waits_for_no_worker(tmp_path):
    # torch waits 5 s for a worker that nobody told to stop.
    seconds = {}
    for name in ("plain", "presample", "history", "auto"):
        last = LastStep()
        workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
        trainer = trained(tmp_path, name, callbacks=[last], **workers)
        ended = time.perf_counter()
        del trainer
        seconds[name] = (ended - last.time, time.perf_counter() - ended)
    print({name: [round(part, 2) for part in found] for name, found in seconds.items()})
    plain = seconds.pop("plain")
    for name, found in seconds.items():
        for ours, theirs in zip(found, plain, strict=True):
            assert ours < theirs + 2.5, (name, seconds, plain)
