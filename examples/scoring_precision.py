"""How much low precision moves the scores: the distribution, and what that costs in variance, on a trained model.

    python examples/scoring_precision.py --tasks clothing sst2 --data path/to/data --models path/to/models

A model is fine-tuned by the plain Trainer, and then scores a pool in float32, bf16 and fp16. ``moved`` is the total
variation distance between the probabilities, the share of the draws that would be others. ``variance`` is the second
moment of the gradient norm when it is drawn by the low precision scores over that when it is drawn by the float32
ones: 1 means that nothing is lost. The result stands in docs/costs.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from remembered_scores import TASKS
from torch.utils.data import DataLoader, Subset

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments, estimate_tau
from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.heads.choose import head_of
from hf_importance.objective.scorer import Scorer


def main() -> None:
    """Train, score, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["clothing", "sst2"])
    parser.add_argument("--epochs", type=float, help="In place of each task's own.")
    parser.add_argument("--pool", type=int, default=512, help="Examples scored.")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], help="Against float32.")
    settings = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in settings.tasks:
        transformers.set_seed(0)
        task = TASKS[name](settings.data, settings.models)
        args = ImportanceTrainingArguments(
            tempfile.mkdtemp(), importance_sampling=False, report_to="none", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            **task.arguments | ({} if settings.epochs is None else {"num_train_epochs": settings.epochs}),
        )  # fmt: skip
        trainer = ImportanceTrainer(task.model(), args, data_collator=task.collator, train_dataset=task.train)
        trainer.train()
        rows = Subset(task.train, range(min(settings.pool, len(task.train))))
        batches = DataLoader(rows, batch_size=64, collate_fn=task.collator)
        model, device = trainer.model, trainer.args.device
        pool = PooledBatches([{n: v.to(device) for n, v in batch.items()} for batch in batches], Padding())
        head = head_of(model, 0.0, None)
        found = {
            dtype: Scorer(lambda model=model: model, head, dtype=dtype)(pool).double()
            for dtype in ("fp32", *settings.precisions)
        }
        full = found["fp32"]
        print(f"{name}, {args.num_train_epochs:g} epochs, {len(full)} examples, tau {float(estimate_tau(full)):.3f}")
        for dtype, score in found.items():
            moved = (score / score.sum() - full / full.sum()).abs().sum() / 2
            variance = (full.square() / score).sum() * score.sum() / full.sum() ** 2
            print(f"{dtype}: moved {float(moved):.5f}, variance {float(variance):.6f}", flush=True)


if __name__ == "__main__":
    main()
