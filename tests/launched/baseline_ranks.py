"""Run by ``tests/test_baseline_ranks.py`` under a launcher: trains by the baselines; every rank writes what it saw."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import toys

from hf_importance import ImportanceTrainer
from hf_importance.visits import INDEX


class Look(ImportanceTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.trained.append(inputs[INDEX].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def rounded_loss(outputs, labels):
    """Sums over ranks differ in the last bits, which would change the rank of examples of nearly equal loss."""
    losses = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return (50 * losses).round() / 50


def build(folder, ranks, method, examples=128, score=None, **overrides):
    settings = {
        "importance_method": method,
        "importance_score": "loss",
        "per_device_train_batch_size": 16 // ranks,
        "max_steps": 32,
        "logging_steps": 1,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        **overrides,
    }
    args, data = toys.arguments(folder, **settings), toys.sentences(examples)
    trainer = Look(model=toys.bert(), args=args, train_dataset=data, compute_score_func=score)
    trainer.trained = []
    return trainer


def seen(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    table = trainer.importance_table()
    return {
        "world": trainer.args.world_size,
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "trained": trainer.trained,
        "table": {name: table[name][:] for name in ("score", "age", "visits", "weight_sum")},
        "log": [e for e in trainer.state.log_history if "loss" in e],
    }


def main():
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("RANK", 0))
    trainers = {
        "prioritized": build(
            folder / "prioritized", ranks, "prioritized", save_strategy="steps", save_steps=21, redraw_every=3
        ),
        "ranked": build(folder / "ranked", ranks, "online_batch_selection", score=rounded_loss, recompute_every=5),
        # Does not divide by the number of ranks, so that one example is scored twice.
        "uneven": build(folder / "uneven", ranks, "online_batch_selection", examples=127, recompute_every=7),
    }
    for trainer in trainers.values():
        trainer.train()
    trainers["resumed"] = build(
        folder / "again", ranks, "prioritized", redraw_every=3, save_strategy="steps", save_steps=21
    )
    trainers["resumed"].train(resume_from_checkpoint=str(folder / "prioritized" / "checkpoint-21"))
    for name, trainer in trainers.items():
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen(trainer)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
