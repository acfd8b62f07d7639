"""What is refused before training, in words that name the argument, its value, and what to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_importance.batches import batch_size_of
from hf_importance.heads import KNOWN_TASKS
from hf_importance.training_args import ImportanceArguments

logger = logging.getLogger(__name__)

NO_ITEMS = (
    "Step {step}: every label of a batch is ignored (-100), so its loss is 0 / 0. Remove such examples from "
    "train_dataset, or see whether the data_collator should have made labels for them."
)


def unknown_head(model: nn.Module) -> str:
    """Say that a model's loss is not known to split by example, and what to do."""
    return (
        f"Importance sampling needs the loss of each example, and does not know how that of {type(model).__name__} "
        f"splits. Known are models whose class name ends in {', '.join(KNOWN_TASKS[:-1])} or {KNOWN_TASKS[-1]}, or "
        "whose attribute loss_type is one of these. What to do: pass a compute_loss_func(outputs, labels, "
        "num_items_in_batch) that is a sum over examples divided by num_items_in_batch, or train as the plain Trainer "
        "does with importance_sampling=False."
    )


def check_dataset(examples: int, batch_size: int, presample_ratio: float | None) -> None:
    """Refuse a dataset from which no pool can be drawn.

    Raises:
        ValueError: It has fewer examples than a pool, two batches where its size follows the cost rule.
    """
    pool = 2 * batch_size if presample_ratio is None else math.ceil(batch_size * presample_ratio)
    if examples < pool:
        said = "auto" if presample_ratio is None else f"{presample_ratio:g} times a batch of {batch_size}"
        raise ValueError(
            f"train_dataset has {examples} examples, fewer than the pool of {pool} that an importance step scores "
            f"(presample_ratio={said}). What to do: lower per_device_train_batch_size or presample_ratio, or train "
            "with importance_sampling=False."
        )


def check_setup(settings: ImportanceArguments, args: TrainingArguments) -> None:
    """Refuse what could not work: several GPUs in one process, and a threshold that τ can never pass.

    A *derived* threshold with that fate only warns: swapping two words must always train.

    Raises:
        ValueError: It could not work.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which Trainer would use through DataParallel; importance "
            "sampling needs one process a GPU. Start the script with: accelerate launch --multi_gpu --num_processes "
            f"{args.n_gpu} script.py, or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "accelerator_config has even_batches=False: one rank would train on a batch more than another and wait "
            "for it for ever. Leave even_batches True, or set dataloader_drop_last=True."
        )
    check_threshold(settings, args, args.train_batch_size)


def check_threshold(settings: ImportanceArguments, args: TrainingArguments, batch_size: int) -> None:
    """Refuse a given threshold that τ can never pass, and warn of a derived one.

    Args:
        settings: The threshold.
        args: The accumulation and the number of ranks.
        batch_size: Examples in a micro-batch; ``auto_find_batch_size`` may have lowered it.

    Raises:
        ValueError: A given threshold is never passed.
    """
    examples = batch_size * args.gradient_accumulation_steps * args.world_size
    highest = math.sqrt(examples)
    if settings.threshold < highest:
        return
    message = (
        f"tau is measured on the {examples} examples of one optimizer step while importance sampling is off, so it "
        f"cannot pass {highest:.3g}, and the {{which}} tau_threshold of {settings.threshold:.3g} is never passed. "
        f"What to do: take more than {settings.threshold**2:.3g} examples an optimizer step "
        "(per_device_train_batch_size, gradient_accumulation_steps), or a tau_threshold below "
        f"{highest:.3g}."
    )
    derived = settings.tau_threshold is None or settings.threshold_follows_kappa
    if not derived and batch_size == args.train_batch_size:
        raise ValueError(message.format(which="given"))
    which = "derived" if derived else "given"
    logger.warning("Importance sampling will stay off: %s", message.format(which=which))


def check_batch(batch: Mapping[str, Any], batch_size: int) -> None:
    """Refuse examples that were run together into one row: they can no longer be told apart.

    Args:
        batch: The first batch.
        batch_size: Examples that it should be made of.

    Raises:
        ValueError: One row stands for several examples.
    """
    # Positions that start anew within a row, and no mask, are how a flattening collator keeps texts apart.
    flattened = "cu_seq_lens_q" in batch or ("position_ids" in batch and "attention_mask" not in batch)
    if flattened and batch_size_of(batch) == 1 < batch_size:
        raise ValueError(
            f"The data_collator made one row of {batch_size} examples (packing, padding_free, or flattening), so they "
            "cannot be drawn one by one. Let it pad instead, or train with importance_sampling=False."
        )
