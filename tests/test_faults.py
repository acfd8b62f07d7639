"""What goes wrong on real machines: a full disk, Ctrl-C, a time limit, a worker that raises, an overflow.

Every time the user hears what happened, the checkpoints that were whole stay so, and resuming is exact.
"""

import logging
import os
import resource
import signal
import time

import pytest
import torch
import toys
from safetensors import SafetensorError
from test_resume import assert_same_parameters, build
from test_saved_state import snapshot
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceTrainer, Presample
from hf_importance.checkpoint.whole import HalfWritten, check_whole
from hf_importance.run.saved import schema, state_of

SCHEMA = schema(Presample())


class At(TrainerCallback):
    """Does something at an event of one step."""

    def __init__(self, event, step, action):
        self.step, self.action = step, action
        setattr(self, event, self.do)

    def do(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


# ---- A full disk ----

KILOBYTE = 1024


def limit_file_size(size):
    """Let every write beyond a size fail, as on a full disk: with an OSError, since Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_harms_no_earlier_checkpoint(tmp_path, caplog, name):
    data = toys.sentences(128)
    trainer = build(tmp_path, data)

    def fill():
        sizes = {file.name: file.stat().st_size for file in (tmp_path / "checkpoint-5").iterdir()}
        if name == "trainer_state.json":  # the smallest: made the largest
            trainer.state.log_history.append({"note": "x" * 2 * max(sizes.values())})
            limit_file_size(max(sizes.values()) + KILOBYTE)
        else:
            assert sizes[name] > 16 * KILOBYTE  # nothing else that is written meanwhile is as large
            limit_file_size(sizes[name] - 4 * KILOBYTE)

    trainer.add_callback(At("on_step_end", 9, fill))
    try:
        # What torch itself says of it is "basic_ios::clear: iostream error", in one version.
        with caplog.at_level(logging.ERROR, "hf_importance"), pytest.raises((OSError, RuntimeError, SafetensorError)):
            trainer.train()
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    (record,) = [
        r for r in caplog.records if "resume_from_checkpoint=True takes the newest whole one" in r.getMessage()
    ]
    assert f"{tmp_path}/checkpoint-10" in record.getMessage()
    check_whole(tmp_path / "checkpoint-5", SCHEMA)
    with pytest.raises(HalfWritten):
        check_whole(tmp_path / "checkpoint-10", SCHEMA)
    resumed = build(tmp_path, data)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "whole", data)
    whole.train()
    assert_same_parameters(whole, resumed)


# ---- Ctrl-C and time limits ----


def test_ctrl_c_while_scoring_leaves_a_usable_trainer_and_checkpoints(tmp_path):
    data, interrupting = toys.sentences(128), []

    def make_score(trainer):
        def score(outputs, labels):
            if trainer in interrupting and trainer.state.global_step == 7 and not trainer.model.training:
                interrupting.clear()
                signal.raise_signal(signal.SIGINT)
            return trainer._objective.head.upper_bound(outputs, {"labels": labels})

        return score

    whole = build(tmp_path / "whole", data, make_score)
    whole.train()
    trainer = build(tmp_path / "interrupted", data, make_score)
    interrupting.append(trainer)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by pytest's worker processes
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert all(module.training for module in trainer.model.modules())  # scoring was in eval()
    before = snapshot(tmp_path / "interrupted" / "checkpoint-5")
    assert not interrupting
    trainer.train(resume_from_checkpoint=True)  # the same trainer goes on
    assert_same_parameters(whole, trainer)
    assert snapshot(tmp_path / "interrupted" / "checkpoint-5") == before


@pytest.mark.parametrize(
    ("event", "stream"),
    # Asked for at the end of a substep, it comes between the backward passes and the optimizer's step.
    [("on_step_begin", False), ("on_substep_end", False), ("on_substep_end", True), ("on_step_end", True)],
)
def test_a_checkpoint_just_in_time_resumes_exactly(tmp_path, event, stream):
    # transformers' enable_jit_checkpoint saves at three events of a step, also in the middle of it.
    data = toys.sentences(640)
    data = data.to_iterable_dataset() if stream else data
    settings = {"gradient_accumulation_steps": 2, "save_steps": 100, "max_steps": 6}
    # Without dropout: the Trainer saves the random state as it is in the middle of the step.
    whole = build(tmp_path / "whole", data, dropout=0.0, **settings)
    whole.train()
    first = build(tmp_path / "preempted", data, dropout=0.0, enable_jit_checkpoint=True, **settings)
    (jit,) = [c for c in first.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback"]
    first.callback_handler.callbacks.remove(jit)  # it comes behind what asks for it
    first.add_callback(At(event, 3, lambda: setattr(jit.jit_manager, "is_checkpoint_requested", True)))
    first.add_callback(jit)
    first.train()
    assert [path.name for path in (tmp_path / "preempted").iterdir()] == ["checkpoint-3"]
    resumed = build(tmp_path / "preempted", data, dropout=0.0, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_parameters(whole, resumed)
    assert state_of(resumed._run)[0] == state_of(whole._run)[0]


def test_sigterm_with_enable_jit_checkpoint_saves_and_stops(tmp_path):
    data = toys.sentences(128)
    settings = {"save_steps": 100, "max_steps": 400}
    trainer = build(tmp_path, data, enable_jit_checkpoint=True, **settings)
    trainer.add_callback(At("on_step_end", 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    # transformers waits 3 seconds for the SIGKILL that may follow.
    trainer.add_callback(At("on_step_begin", 4, lambda: time.sleep(3.1)))
    trainer.train()
    assert trainer.state.global_step < 400
    (folder,) = tmp_path.iterdir()
    check_whole(folder, SCHEMA)
    resumed = build(tmp_path, data, **{**settings, "max_steps": trainer.state.global_step + 3})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == trainer.state.global_step + 3


# ---- Data and numbers ----


class Raises(torch.utils.data.Dataset):
    """Sentences, of which some cannot be read."""

    def __init__(self, damaged):
        self.data, self.damaged = toys.sentences(128), damaged

    def __len__(self):
        return 128

    def __getitem__(self, index):
        if index in self.damaged:
            raise OSError(f"shard 7 cannot be read: example {index}")
        return self.data[index]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("on", "step"), [(True, 1), (False, 6)])
def test_a_worker_that_raises_is_heard(tmp_path, workers, on, step):
    # The Trainer's own loader gets there with step 7; the reserve with the first pool it draws, in step 2.
    order = [
        index for batch in build(tmp_path, toys.sentences(128)).get_train_dataloader().batch_sampler for index in batch
    ]
    damaged = set(order[100:])
    settings = {"dataloader_num_workers": workers, "save_steps": 1}
    trainer = build(tmp_path, Raises(damaged), tau_threshold=1.0 + 1e-9 if on else 3.9, **settings)
    with pytest.raises(OSError, match=rf"shard 7 cannot be read: example ({'|'.join(map(str, damaged))})\b"):
        trainer.train()
    assert trainer.state.global_step in ({1} if on else {5, 6})  # accelerate reads one batch ahead
    check_whole(tmp_path / f"checkpoint-{trainer.state.global_step}", SCHEMA)


@pytest.mark.parametrize("on", [False, True])
def test_an_overflow_in_half_precision_trains_as_the_plain_trainer_and_is_counted(tmp_path, caplog, on):
    data = toys.sentences(128)

    def train(kind, folder):
        model = toys.bert().half()
        # SGD: below torch 2.8 the Trainer's Adam is not the fused one, and divides 0 by 0 in half precision.
        settings = {"logging_steps": 1, "max_steps": 5, "learning_rate": 0.0, "optim": "sgd"}
        args = (toys.always_on if on else toys.arguments)(folder, **settings)
        trainer = kind(model=model, args=args, train_dataset=data)

        def overflow():  # half precision ends at 65,504: one class or the other passes it, whatever the features are
            model.classifier.weight.data.copy_(torch.tensor([[60_000.0], [-60_000.0], [0.0], [0.0]]).expand(4, 16))
            model.classifier.bias.data.fill_(65_504)

        trainer.add_callback(At("on_step_end", 2, overflow))
        trainer.train()
        return trainer

    with caplog.at_level(logging.WARNING, "hf_importance"):
        ours = train(ImportanceTrainer, tmp_path / "ours")
    plain = train(Trainer, tmp_path / "plain")
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    last = next(e for e in reversed(ours.state.log_history) if "loss" in e)
    assert last["importance/nonfinite_steps"] == 3
    assert sum("a score is NaN or infinite" in r.getMessage() for r in caplog.records) == 1
