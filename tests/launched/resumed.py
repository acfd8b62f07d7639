"""Run by ``tests/test_resume_distributed.py`` under a launcher: ranks train, resume, and compare, or one of them dies.

accelerate launch --multi_gpu --num_processes 2 tests/launched/resumed.py FOLDER [rank-dies]
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import toys

from hf_importance import ImportanceTrainer


def build(folder, data, **overrides):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "logging_steps": 1, **overrides}
    args = toys.always_on(folder, per_device_train_batch_size=8, **settings)
    return ImportanceTrainer(toys.bert(dropout=0.1), args, train_dataset=data)


def compare(folder, data, **overrides):
    """Give how the run that was resumed at step 5 differs from the one that was not."""
    whole = build(folder, data, **overrides)
    whole.train()
    resumed = build(folder / "resumed", data, **overrides)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    models = [t.accelerator.unwrap_model(t.model_wrapped).state_dict() for t in (whole, resumed)]
    timed = ("_share", "_runtime", "_per_second", "train_loss", "kappa", "overhead", "_seconds")
    histories = [
        [{k: v for k, v in e.items() if not k.endswith(timed)} for e in h]
        for h in (whole.state.log_history, resumed.state.log_history)
    ]
    return {
        "world": whole.args.world_size,
        "different": [name for name, value in models[0].items() if not torch.equal(value, models[1][name])],
        "histories equal": histories[0] == histories[1],
        "switches": [t._run.state.switches for t in (whole, resumed)],
        "stream": [asdict(t._run.feed.state.stream) for t in (whole, resumed)],
    }


def one_rank_dies(folder):
    trainer = build(folder, toys.sentences(128), max_steps=1000)

    def score(outputs, labels):
        if trainer.state.global_step == 7 and trainer.args.process_index == 1:
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0 + (labels % 3).float()

    trainer.compute_score_func = score
    trainer.train()


def main():
    folder = Path(sys.argv[1])
    if "rank-dies" in sys.argv:
        one_rank_dies(folder)
        return
    data = toys.sentences(320)
    cases = {
        "on": (data, {}),
        "off": (data, {"tau_threshold": 3.9}),
        "accumulated, with workers": (data, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}),
        "stream": (toys.sentences(960).to_iterable_dataset(), {}),
    }
    for name, (dataset, overrides) in cases.items():
        found = compare(folder / name, dataset, **overrides)
        (folder / f"{name}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    toys.leave_processes()


if __name__ == "__main__":
    main()
