"""How much low precision moves the scores: the distribution, and what that costs in variance, on a trained model.

    python examples/scoring_precision.py --task sst2 --data path/to/data --models path/to/models --steps 150

A model is fine-tuned by the plain Trainer, and then scores a pool in float32, bf16 and fp16. ``moved`` is the total
variation distance between the probabilities, the share of the draws that would be others. ``variance`` is the second
moment of the gradient norm when it is drawn by the low precision scores over that when it is drawn by the float32
ones: 1 means that nothing is lost. The result stands in docs/costs.md.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field

import torch
import transformers
from presampling_equal_time import TASKS, Arguments, load
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments, estimate_tau
from hf_importance.batches import Pool
from hf_importance.presampling import score_pool


@dataclass
class PoolArguments:
    """What is scored."""

    pool: int = field(default=512, metadata={"help": "Examples scored."})
    precisions: list[str] = field(
        default_factory=lambda: ["bf16", "fp16"], metadata={"help": "Against float32; a CPU is slow in fp16."}
    )


def main() -> None:
    """Train, score, compare."""
    arguments, scored = HfArgumentParser([Arguments, PoolArguments]).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    task = load(arguments)
    args = ImportanceTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        importance_sampling=False,
        batch_norm="frozen",
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        learning_rate=TASKS[arguments.task]["learning_rate"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = ImportanceTrainer(task.new_model(), args, data_collator=task.collate, train_dataset=task.train)
    trainer.train()
    rows = Subset(task.train, range(min(scored.pool, len(task.train))))
    batches = DataLoader(rows, batch_size=64, collate_fn=task.collate)
    pool = Pool([trainer._prepare_inputs(batch) for batch in batches], trainer._padding())
    found = {
        dtype: score_pool(trainer.model, pool, trainer._head, "upper_bound", None, None, dtype=dtype).double()
        for dtype in ("fp32", *scored.precisions)
    }
    full = found["fp32"]
    print(f"{arguments.task}, {arguments.steps} steps, {len(full)} examples, tau {float(estimate_tau(full)):.3f}")
    for dtype, score in found.items():
        moved = (score / score.sum() - full / full.sum()).abs().sum() / 2
        variance = (full.square() / score).sum() * score.sum() / full.sum() ** 2
        print(f"{dtype}: moved {float(moved):.5f}, variance {float(variance):.6f}")


if __name__ == "__main__":
    main()
