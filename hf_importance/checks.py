"""What is refused before training, in words that name the argument, its value, and what to do."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from hf_importance.batches import batch_size_of
from hf_importance.heads import KNOWN_TASKS
from hf_importance.training_args import BASELINES, ImportanceArguments

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


def cannot_remember(dataset: Any, args: TrainingArguments, method: str) -> str | None:
    """Say why scores cannot be remembered for a dataset, and what to do, or None where they can.

    It is a stream or has no length, or the Trainer is to choose the order by lengths.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return (
            f"importance_method={method!r} remembers a score for each example, so train_dataset must be map-style "
            f"(__len__ and __getitem__), but it is a {type(dataset).__name__}. Use importance_method='presample' for "
            "a stream, or load the dataset without streaming."
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        return (
            f"importance_method={method!r} draws its own order, and train_sampling_strategy="
            f"{args.train_sampling_strategy!r} asks for one by lengths. Leave it 'random', or use "
            "importance_method='presample'."
        )
    return None


def check_history(dataset: Any, settings: ImportanceArguments, args: TrainingArguments) -> None:
    """Refuse what scores cannot be remembered for; where the method is chosen by itself, say that history is out.

    Raises:
        ValueError: See :func:`cannot_remember`.
    """
    method = settings.importance_method
    reason = cannot_remember(dataset, args, "history" if method == "auto" else method)
    if reason is not None and method == "auto":
        logger.warning("importance_method='auto' chooses between presampling and uniform steps only. %s", reason)
        return
    if reason is not None:
        raise ValueError(reason)
    if method != "auto" and (
        (
            0 < args.max_steps
            and args.max_steps * args.train_batch_size * args.world_size * (args.gradient_accumulation_steps)
            <= len(dataset)
        )
        or (args.max_steps <= 0 and args.num_train_epochs <= 1)
    ):
        logger.warning(
            "importance_method=%r has nothing to remember in a run of one epoch: no example is seen twice, and "
            "it will train uniformly. Use importance_method='presample', or more epochs.",
            method,
        )


def check_setup(settings: ImportanceArguments, args: TrainingArguments) -> None:
    """Refuse what could not work.

    Several GPUs in one process, processes that do not know of each other, ranks with unequal batches, gradient norms
    under FSDP and DeepSpeed, and a threshold that τ can never pass. A *derived* threshold with that fate only warns:
    swapping two words must always train.

    Raises:
        ValueError: It could not work.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which Trainer would use through DataParallel; importance "
            "sampling needs one process a GPU. Start the script with: accelerate launch --multi_gpu --num_processes "
            f"{args.n_gpu} script.py, or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
        )
    check_launch(args, os.environ)
    state = None if args.distributed_state is None else args.distributed_state.distributed_type
    if settings.importance_score == "gradient_norm" and state in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        # Tried: under FSDP2 autograd finds none of the parameters, ZeRO-2 raises an IndexError, ZeRO-3 gives others.
        raise ValueError(
            f"importance_score='gradient_norm' needs the gradients of single examples, and {state.value} takes hold "
            "of gradients as they are made. Use 'upper_bound', which needs none, or train without it."
        )
    if settings.learning_rate_scaling is not None:
        stepping = str(getattr(args.optim, "value", args.optim))
        if state == DistributedType.DEEPSPEED or stepping.endswith(("layerwise", "lomo")):
            where = "DeepSpeed" if state == DistributedType.DEEPSPEED else f"optim={stepping!r}"
            raise ValueError(
                f"learning_rate_scaling={settings.learning_rate_scaling!r} raises the learning rate around "
                f"optimizer.step(), and {where} updates the parameters during the backward pass. Leave it None."
            )
    if settings.importance_method in BASELINES and settings.redraw_every == 1 and args.dataloader_num_workers > 0:
        logger.warning(
            "redraw_every=1 draws at every optimizer step, and each draw starts dataloader_num_workers=%d processes "
            "anew. Raise redraw_every, or set dataloader_num_workers=0.",
            args.dataloader_num_workers,
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "accelerator_config has even_batches=False: one rank would train on a batch more than another and wait "
            "for it for ever. Leave even_batches True, or set dataloader_drop_last=True."
        )
    if settings.importance_method == "presample":
        check_threshold(settings, args, args.train_batch_size)


def check_launch(args: TrainingArguments, environment: Mapping[str, str]) -> None:
    """Refuse processes that a launcher started together and that would train apart, all into one output folder.

    That is what ``accelerate launch --multi_gpu`` and ``torchrun`` make of a machine without an accelerator, and say
    nothing. Only what they tell their processes counts (``LOCAL_RANK`` and ``WORLD_SIZE``): the variables of SLURM
    and MPI say how many tasks there are, not that they train together.

    Args:
        args: How many processes know of each other.
        environment: The environment variables.

    Raises:
        ValueError: Several were started, and this one is alone.
    """
    started = environment.get("WORLD_SIZE", "")
    if "LOCAL_RANK" not in environment or not started.isdecimal() or int(started) < 2:
        return
    # On SageMaker and TPUs one world of several processes may have one data-parallel rank.
    if args.world_size == 1 and args.parallel_mode in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED):
        raise ValueError(
            f"The launcher started {started} processes (WORLD_SIZE={started}), but this one trains alone (world size "
            f"1): without a GPU they do not find each other, and all {started} would write into "
            f"output_dir={args.output_dir!r}. On CPUs pass use_cpu=True, or start the script with: "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {started} script.py; DeepSpeed on "
            "CPUs takes a configuration file of accelerate, ddp_backend='gloo' and no use_cpu. If the runs are meant "
            "to be separate, unset LOCAL_RANK and WORLD_SIZE."
        )


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
    if settings.threshold is None:
        if batch_size * args.gradient_accumulation_steps == 1:
            logger.warning(
                "Importance sampling will stay off: whether it pays is measured on the examples of one optimizer step "
                "on each rank, and 1 says nothing. What to do: raise per_device_train_batch_size or "
                "gradient_accumulation_steps, or set tau_threshold."
            )
        return
    if settings.threshold < highest:
        return
    message = (
        f"tau is measured on the {examples} examples of one optimizer step while importance sampling is off, so it "
        f"cannot pass {highest:.3g}, and the {{which}} tau_threshold of {settings.threshold:.3g} is never passed. "
        f"What to do: take more than {settings.threshold**2:.3g} examples an optimizer step "
        "(per_device_train_batch_size, gradient_accumulation_steps), or a tau_threshold below "
        f"{highest:.3g}."
    )
    derived = settings.tau_threshold is None
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
