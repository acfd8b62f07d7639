"""Run by ``tests/test_distributed.py`` under a launcher: each case trains, and every rank writes down what it saw."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import toys
from datasets import Dataset

from hf_importance import ImportanceTrainer


class Stream(torch.utils.data.IterableDataset):
    """Rows of a dataset, one after the other."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def parameters(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


class Look(ImportanceTrainer):
    """Keeps the examples of every batch that is trained on."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.trained += [batch["input_ids"].sum(-1).tolist() for batch in batches]
        return batches, items


def train(folder, data, **overrides):
    make = toys.always_on if overrides.pop("on", False) else toys.arguments
    trainer = Look(model=toys.bert(**overrides.pop("model", {})), args=make(folder, **overrides), train_dataset=data)
    trainer.trained = []
    trainer.train()
    history = [{k: v for k, v in e.items() if not k.endswith(("_per_second", "_runtime", "time_share"))}
               for e in trainer.state.log_history]  # fmt: skip
    return {
        "world": trainer.args.world_size,
        "parameters": parameters(trainer).tolist(),
        "history": history,
        "trained": trainer.trained,
        "tau": trainer.sampler.run.tau(),
        "kappa": trainer.sampler.run.clock.kappa,
        "steps": trainer.state.global_step,
    }


def cases(folder, ranks):
    """Every case is the same work whatever the number of ranks: examples a step are kept equal."""
    data = toys.sentences(96)
    small = {"per_device_train_batch_size": 16 // ranks, "optim": "sgd"}
    yield "uniform", lambda: train(folder, data, tau_threshold=3.9, **small)
    yield (
        "uniform, accumulated",
        lambda: train(folder, data, tau_threshold=3.9, gradient_accumulation_steps=3, max_steps=4, **small),
    )
    yield (
        "counted on each rank",
        lambda: train(
            folder,
            data,
            tau_threshold=3.9,
            average_tokens_across_devices=False,
            gradient_accumulation_steps=2,
            **small,
        ),
    )
    yield (
        "on, counted on each rank",
        lambda: train(folder, data, on=True, average_tokens_across_devices=False, max_steps=4, **small),
    )
    yield "honours the item count", lambda: train_vit(folder, small)
    yield "on", lambda: train(folder, data, on=True, max_steps=6, **small)
    yield "on, accumulated", lambda: train(folder, data, on=True, gradient_accumulation_steps=2, max_steps=4, **small)
    # Sizes of pool and batch follow a kappa that is measured on the way.
    follow = {"presample_ratio": "auto", "importance_budget": "constant_time"}
    yield "follows kappa", lambda: train(folder, data, on=True, max_steps=10, **follow, **small)
    uneven = toys.sentences(16 * 3 + 5)
    for name, config in {
        "uneven": {},
        "split batches": {"split_batches": True},
        "dispatched": {"dispatch_batches": True},
    }.items():
        yield (
            name,
            lambda config=config: train(
                folder, uneven, on=True, max_steps=-1, num_train_epochs=2, accelerator_config=config, **small
            ),
        )
    yield "stream", lambda: train(folder, Stream(uneven), on=True, max_steps=6, **small)


def train_vit(folder, small):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((96, 1, 8, 8), generator=generator)
    data = Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": [i % 10 for i in range(96)]})
    args = toys.arguments(folder, tau_threshold=3.9, max_steps=4, **small)
    trainer = ImportanceTrainer(model=toys.vit(), args=args, train_dataset=data.with_format("torch"))
    trainer.train()
    losses = [e for e in trainer.state.log_history if "loss" in e]
    return {"world": args.world_size, "parameters": parameters(trainer).tolist(), "history": losses}


def main():
    folder, ranks, wanted = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for name, case in cases(folder, ranks):
        if wanted and name not in wanted:
            continue
        found = case()
        rank = dist.get_rank() if dist.is_initialized() else 0
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
    toys.leave_processes()


if __name__ == "__main__":
    main()
