"""A long run with the switch flapping holds no more memory, file handles or threads at its end than at its start."""

import os
import threading
from pathlib import Path

import pytest
import toys
from test_resume import build
from transformers import TrainerCallback

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
    assert trainer._switch.switches >= steps // 3 - 1
    warm, end = watch.seen[steps // 10 * 2], watch.seen[steps]
    assert end["file handles"] <= warm["file handles"]
    assert end["threads"] <= warm["threads"]
    assert end["Python threads"] <= warm["Python threads"]
    assert end["resident MB"] <= warm["resident MB"] + megabytes
