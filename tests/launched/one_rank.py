"""Run by ``tests/test_distributed.py`` under a launcher: on one of two ranks something stands in the way."""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import toys
from datasets import Dataset
from transformers import Trainer, ViTForImageClassification

from hf_importance import ImportanceTrainer


class Says(logging.Handler):
    """Keeps what this rank says."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


class MoreForImageClassification(ViTForImageClassification):
    """Takes one entry more."""

    def forward(self, *args, extra=None, **kwargs):
        return super().forward(*args, **kwargs)


class Past:
    """Computes the loss of one step past ours, and gives no outputs, so that ours cannot be called around it."""

    def __init__(self, *args, at, **kwargs):
        self.at = at
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == self.at and self.args.process_index == 1:
            return model(**inputs).loss
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class OwnLoader:
    """Has a loader of another kind on one rank, of as many batches."""

    def get_train_dataloader(self):
        rank = self.args.process_index
        part = self.train_dataset.select(range(48 * rank, 48 * rank + 48))
        kind = torch.utils.data.RandomSampler if rank == 0 else torch.utils.data.SequentialSampler
        return torch.utils.data.DataLoader(part, 8, sampler=kind(part), collate_fn=self.data_collator)


def collator(extra):
    def collate(rows):
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        return {**batch, "extra": torch.tensor(float(extra(batch)))}

    return collate


def train(kind, folder, mixins=(), given=None, extra=lambda batch: 0, score=None, examples=96, **settings):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((examples, 1, 8, 8), generator=generator)
    data = Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": [i % 10 for i in range(examples)]})
    torch.manual_seed(0)
    args = toys.always_on(
        folder,
        per_device_train_batch_size=8,
        logging_steps=1,
        remove_unused_columns=False,
        **{"max_steps": 6, **settings},
    )
    trainer = type("Own", (*mixins, kind), {})(
        model=MoreForImageClassification(toys.vit().config),
        args=args,
        train_dataset=data.with_format("torch"),
        data_collator=collator(extra),
        **(given or {}),
        **({"compute_score_func": score} if score is not None and kind is ImportanceTrainer else {}),
    )
    says, logger = Says(), logging.getLogger("hf_importance")
    logger.addHandler(says)
    trainer.train()
    logger.removeHandler(says)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return {
        "world": args.world_size,
        "steps": trainer.state.global_step,
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "drawn": [e["importance/active_share"] for e in trainer.state.log_history if "importance/active_share" in e],
        "off": [one.removeprefix(toys.OFF) for one in says.said if one.startswith(toys.OFF)],
    }


def on_rank_1(batch):
    """Differ from batch to batch on one of two ranks."""
    return dist.get_rank() == 1 and int(1000 * batch["pixel_values"].sum()) % 7


CASES = {
    "in the first step": {"mixins": (Past,), "given": {"at": 0}},
    "while on": {"mixins": (Past,), "given": {"at": 3}},
    "while on, by history": {
        "mixins": (Past,),
        "given": {"at": 60},
        "examples": 256,
        "score": lambda outputs, labels: 1.0 + 9.0 * (labels == 0).float(),
        "importance_method": "history",
        "max_steps": 64,
        "tau_threshold": None,
    },
    "in a pool": {"extra": on_rank_1},
    "in its loader": {"mixins": (OwnLoader,)},
}


def main():
    folder = Path(sys.argv[1])
    for name, case in CASES.items():
        found = {kind.__name__: train(kind, folder / "run", **case) for kind in (ImportanceTrainer, Trainer)}
        (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(found))
    toys.leave_processes()


if __name__ == "__main__":
    main()
