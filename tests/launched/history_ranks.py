"""Run by ``tests/test_history_ranks.py`` under a launcher: trains by history; every rank writes down what it saw."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import toys
from transformers import TrainerCallback

from hf_importance import ImportanceTrainer
from hf_importance.batches.entries import INDEX


def uneven(outputs, labels):
    return 1.0 + 9.0 * (labels == 0).float()


class Asks(TrainerCallback):
    """The first rank asks for the table now and then, and no other does."""

    def __init__(self):
        self.trainer, self.visits = None, []

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 0 and state.global_step % 7 == 0:
            self.visits.append(sum(self.trainer.importance_table()["visits"]))


class Look(ImportanceTrainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.trained += [batch[INDEX].tolist() for batch in toys.handed(self, batches)]
        return batches, items


def build(folder, ranks, **overrides):
    settings = {
        "importance_method": "history",
        "per_device_train_batch_size": 16 // ranks,
        "max_steps": 6 * 16,
        "logging_steps": 4,
        "optim": "sgd",
        **overrides,
    }
    asks = Asks()
    trainer = Look(
        model=toys.bert(),
        args=toys.arguments(folder, **settings),
        train_dataset=toys.sentences(256),
        compute_score_func=uneven,
        callbacks=[asks],
    )
    trainer.trained, trainer.asks, asks.trainer = [], asks, trainer
    return trainer


def seen(trainer, rank):
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    found = {
        "world": trainer.args.world_size,
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "trained": trainer.trained,
        "gain": trainer.sampler.gain,
        "passes": trainer.sampler.run.draws(),
        "active": trainer.sampler.active,
        "log": [e for e in trainer.state.log_history if "importance/gain" in e],
        "asked": trainer.asks.visits,
    }
    if rank > 0:
        time.sleep(1)  # the first rank does not wait for it
    table = trainer.importance_table()
    return found | {name: table[name][:] for name in ("score", "age", "visits", "weight_sum")}


def main():
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("RANK", 0))
    whole = build(folder / "run", ranks, save_strategy="steps", save_steps=64)
    whole.train()
    shrunk = build(folder / "shrunk", ranks, importance_budget="constant_variance")
    shrunk.train()
    smaller = {"importance_budget": "constant_variance", "gradient_accumulation_steps": 4, "max_steps": 6 * 4}
    gathered = build(folder / "gathered", ranks, logging_steps=1, **smaller)
    gathered.train()
    resumed = build(folder / "again", ranks, save_strategy="steps", save_steps=64)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-64"))
    for name, trainer in {"whole": whole, "shrunk": shrunk, "gathered": gathered, "resumed": resumed}.items():
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen(trainer, rank)))
    toys.leave_processes()


if __name__ == "__main__":
    main()
