"""Run by ``tests/test_uneven_ranks.py`` under a launcher: one case in which the ranks' data end at different times."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fsdp2_on_cpu
import torch
import toys
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_importance import ImportanceTrainer


def rows(shards):
    for start, end in shards:
        yield from toys.sentences(200).select(range(start, end))


def shards(*sizes):
    """Give a stream of one shard a rank, of these sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    bounds = list(zip([0, *ends], ends, strict=False))
    return IterableDataset.from_generator(rows, gen_kwargs={"shards": bounds}).with_format("torch")


class OwnLoader(ImportanceTrainer):
    """Every rank loads a part of its own, as large as it likes."""

    def get_train_dataloader(self):
        rank = self.args.process_index
        part = self.train_dataset.select(range(rank, 96 - 32 * rank, 2))
        return DataLoader(part, batch_size=8, shuffle=True, collate_fn=self.data_collator)


STREAM = {"accelerator_config": {"dispatch_batches": False}, "max_steps": 12}
CASES = {
    "stream": (STREAM, lambda: shards(60, 28)),
    "accumulated stream": ({**STREAM, "gradient_accumulation_steps": 2, "max_steps": 8}, lambda: shards(60, 20)),
    "an empty shard": (STREAM, lambda: shards(60, 0)),
    "dropped": (
        {"accelerator_config": {"even_batches": False}, "dataloader_drop_last": True, "max_steps": -1},
        lambda: toys.sentences(53),
    ),
    "own loaders": ({"max_steps": -1}, lambda: toys.sentences(96)),
}


def main():
    _, wrapper, folder, name, phase = sys.argv
    settings, make_data = CASES[name]
    make = toys.arguments if phase == "off" else toys.always_on
    kind = OwnLoader if name == "own loaders" else ImportanceTrainer
    fsdp = {}
    if wrapper == "fsdp2":
        fsdp2_on_cpu.install()
        fsdp = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
    if phase == "plain":
        fsdp["importance_sampling"] = False
    args = make(folder, per_device_train_batch_size=8, num_train_epochs=2, **{**settings, **fsdp})
    trainer = kind(model=toys.bert(), args=args, train_dataset=make_data())
    trainer.train()
    kind = trainer.accelerator.distributed_type.value
    found = {"world": args.world_size, "steps": trainer.state.global_step, "kind": kind}
    (Path(folder) / f"{name}.{args.process_index}.json").write_text(json.dumps(found))
    toys.leave_processes()


if __name__ == "__main__":
    main()
