"""Run by ``tests/test_published_ranks.py`` under a launcher: trains by published methods; every rank writes down."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import toys

from hf_importance import ImportanceTrainer
from hf_importance.batches.entries import INDEX
from hf_importance.samplers.published import InfoBatch, OnlineBatchSelection, Prioritized


class Look(ImportanceTrainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.trained += [batch[INDEX].tolist() for batch in toys.handed(self, batches)]
        return batches, items


def rounded_loss(outputs, labels):
    """Sums over ranks differ in the last bits, which would change the rank of examples of nearly equal loss."""
    losses = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return (50 * losses).round() / 50


def build(folder, ranks, sampler, examples=128, score=None, **overrides):
    settings = {
        "presample_ratio": "auto",
        "tau_threshold": None,
        "per_device_train_batch_size": 16 // ranks,
        "max_steps": 32,
        "logging_steps": 1,
        "optim": "sgd",
        **overrides,
    }
    trainer = Look(
        model=toys.bert(),
        args=toys.arguments(folder, **settings),
        train_dataset=toys.sentences(examples),
        sampler=sampler,
        compute_score_func=score,
    )
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
    save = {"save_strategy": "steps", "save_steps": 21}
    rescored = OnlineBatchSelection(recompute_every=5)
    trainers = {
        "prioritized": build(folder / "prioritized", ranks, Prioritized(redraw_every=3), **save),
        "ranked": build(folder / "ranked", ranks, rescored, score=rounded_loss),
        # Does not divide by the number of ranks, so that one example is scored twice.
        "uneven": build(folder / "uneven", ranks, OnlineBatchSelection(recompute_every=7), examples=127),
        "info_batch": build(folder / "info_batch", ranks, InfoBatch(), score=rounded_loss),
    }
    for trainer in trainers.values():
        trainer.train()
    trainers["resumed"] = build(folder / "again", ranks, Prioritized(redraw_every=3), **save)
    trainers["resumed"].train(resume_from_checkpoint=str(folder / "prioritized" / "checkpoint-21"))
    for name, trainer in trainers.items():
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen(trainer)))
    toys.leave_processes()


if __name__ == "__main__":
    main()
