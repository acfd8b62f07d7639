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

from hf_importance.batches.entries import batch_size_of
from hf_importance.heads.choose import KNOWN_TASKS
from hf_importance.samplers.auto import Auto
from hf_importance.samplers.presample import Presample
from hf_importance.samplers.sampler import Sampler
from hf_importance.values import check_choice

logger = logging.getLogger(__name__)


def unknown_head(model: nn.Module) -> str:
    """Say that a model's loss is not known to split by example, and what to do."""
    return (
        f"it needs the loss of each example, and does not know how that of {type(model).__name__} "
        f"splits. Known are models whose class name ends in {', '.join(KNOWN_TASKS[:-1])} or {KNOWN_TASKS[-1]}, or "
        "whose attribute loss_type is one of these. Say what the loss of each example is, with "
        "compute_example_losses=..., or pass importance_sampling=False to be rid of this warning"
    )


def too_few(examples: int, batch_size: int, presample_ratio: float | None) -> str | None:
    """Say that a dataset has fewer examples than a pool, two batches where its size follows the cost rule."""
    pool = 2 * batch_size if presample_ratio is None else math.ceil(batch_size * presample_ratio)
    if examples >= pool:
        return None
    said = "auto" if presample_ratio is None else f"{presample_ratio:g} times a batch of {batch_size}"
    return (
        f"train_dataset has {examples} examples, fewer than the pool of {pool} that an importance step scores "
        f"(presample_ratio={said}). Lower per_device_train_batch_size or presample_ratio"
    )


def check_data(sampler: Sampler, dataset: Any, args: TrainingArguments, batch_size: int) -> bool:
    """Check that a sampler can work with a dataset, and say whether it will remember its scores.

    Args:
        sampler: Decides.
        dataset: What is trained on.
        args: Of training.
        batch_size: Examples in a micro-batch; ``auto_find_batch_size`` may have lowered it.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(dataset, IterableDataset) and batch_size != args.train_batch_size:
        check_threshold(sampler, args, batch_size)
    return can_remember(sampler, dataset, args)


def cannot_remember(dataset: Any, args: TrainingArguments, method: str) -> str | None:
    """Say why scores cannot be remembered for a dataset, and what to do, or None where they can.

    It is a stream or has no length, or the Trainer is to choose the order by lengths.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return (
            f"{method} remembers a score for each example, so train_dataset must be map-style (__len__ and "
            f"__getitem__), but it is a {type(dataset).__name__}. Use importance_method='presample' for a stream, or "
            "load the dataset without streaming."
        )
    if getattr(args, "train_sampling_strategy", "random") in ("group_by_length", "batch_rebalance"):
        return (
            f"{method} draws its own order, and train_sampling_strategy={args.train_sampling_strategy!r} asks for one "
            "by lengths. Leave it 'random', or use importance_method='presample'."
        )
    return None


def can_remember(sampler: Sampler, dataset: Any, args: TrainingArguments) -> bool:
    """Say whether scores are remembered in this run.

    Raises:
        ValueError: They cannot be, and the sampler cannot do without.
    """
    if not sampler.remembers:
        return False
    kind = type(sampler).__name__
    method = "importance_method='history'" if kind in ("History", "Auto", "TwoPhase", "Observe") else kind
    reason = cannot_remember(dataset, args, method)
    if reason is None:
        _warn_of_one_epoch(sampler, dataset, args)
    elif sampler.needs_memory:
        raise ValueError(reason)
    elif getattr(args, "importance_method", None) is not None:  # else nobody asked for a memory
        logger.warning("importance_method='auto' chooses between presampling and uniform steps only. %s", reason)
    return reason is None


def _warn_of_one_epoch(sampler: Sampler, dataset: Any, args: TrainingArguments) -> None:
    step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    one_epoch = args.max_steps * step <= len(dataset) if args.max_steps > 0 else args.num_train_epochs <= 1
    if sampler.needs_memory and one_epoch:
        logger.warning(
            "%s has nothing to remember in a run of one epoch: no example is seen twice, and it will train "
            "uniformly. Use importance_method='presample', or more epochs.",
            type(sampler).__name__,
        )


def check_setup(sampler: Sampler, args: TrainingArguments) -> None:
    """Refuse what could not work.

    Processes that do not know of each other, gradient norms under FSDP and DeepSpeed, and a threshold that τ can never
    pass.

    Raises:
        ValueError: It could not work.
    """
    check_launch(args, os.environ)
    state = None if args.distributed_state is None else args.distributed_state.distributed_type
    check_score(sampler)
    if sampler.score == "gradient_norm" and state in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        # Tried: under FSDP2 autograd finds none of the parameters, ZeRO-2 raises an IndexError, ZeRO-3 gives others.
        raise ValueError(
            f"score='gradient_norm' needs the gradients of single examples, and {state.value} takes hold of gradients "
            "as they are made. Use 'upper_bound', which needs none, or train without it."
        )
    check_threshold(sampler, args, args.train_batch_size)


def check_score(sampler: Sampler) -> None:
    """Refuse a score that nobody knows, and one that only a pool can have where scores are remembered.

    Raises:
        ValueError: It is one of these.
    """
    if callable(sampler.score):
        return
    check_choice("score", sampler.score, ("upper_bound", "loss", "gradient_norm"))
    if sampler.score == "gradient_norm" and sampler.remembers:
        raise ValueError(
            "score='gradient_norm' takes a backward pass an example, and what is remembered are the scores that "
            "training passes give at no cost. Use 'upper_bound', or importance_method='presample'."
        )


def stands_in_the_way(sampler: Sampler, args: TrainingArguments, examples: int | None, batch_size: int) -> str | None:
    """Say what of the setting makes importance sampling impossible, or None.

    Args:
        sampler: Decides.
        args: Of training.
        examples: Of the training set; None for a stream.
        batch_size: Of a micro-batch on each rank.
    """
    if args.n_gpu > 1:
        return (
            f"{args.n_gpu} GPUs are visible to one process, which Trainer uses through DataParallel, and it needs one "
            f"process a GPU. Start the script with: accelerate launch --multi_gpu --num_processes {args.n_gpu} "
            "script.py, or make one GPU visible with CUDA_VISIBLE_DEVICES=0"
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches and not args.dataloader_drop_last:
        return (
            "accelerator_config has even_batches=False, so one rank may train on a batch more than another and wait "
            "for it for ever. Leave even_batches True, or set dataloader_drop_last=True"
        )
    ratio = sampler.ratio if isinstance(sampler, Presample) else None
    return None if examples is None or sampler.needs_memory else too_few(examples, batch_size, ratio)


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


def check_threshold(sampler: Sampler, args: TrainingArguments, batch_size: int) -> None:
    """Refuse a threshold that τ can never pass, and warn where nothing can be measured.

    Args:
        sampler: Of presampling, its threshold.
        args: The accumulation and the number of ranks.
        batch_size: Examples in a micro-batch; ``auto_find_batch_size`` may have lowered it.

    Raises:
        ValueError: A given threshold is never passed.
    """
    if not isinstance(sampler, Presample | Auto):
        return
    threshold = sampler.threshold if isinstance(sampler, Presample) else None
    if threshold is None:
        if batch_size * args.gradient_accumulation_steps == 1:
            logger.warning(
                "Importance sampling will stay off: whether it pays is measured on the examples of one optimizer step "
                "on each rank, and 1 says nothing. What to do: raise per_device_train_batch_size or "
                "gradient_accumulation_steps, or set tau_threshold."
            )
        return
    examples = batch_size * args.gradient_accumulation_steps * args.world_size
    highest = math.sqrt(examples)
    if threshold < highest:
        return
    message = (
        f"tau is measured on the {examples} examples of one optimizer step while importance sampling is off, so it "
        f"cannot pass {highest:.3g}, and the given tau_threshold of {threshold:.3g} is never passed. "
        f"What to do: take more than {threshold**2:.3g} examples an optimizer step "
        "(per_device_train_batch_size, gradient_accumulation_steps), or a tau_threshold below "
        f"{highest:.3g}."
    )
    if batch_size == args.train_batch_size:
        raise ValueError(message)
    logger.warning("Importance sampling will stay off: %s", message)


def wrong_with_batch(batch: Any, batch_size: int) -> str | None:
    """Say why the examples of a batch cannot be drawn one by one, or None where nothing speaks against it.

    Args:
        batch: The first batch.
        batch_size: Examples that it should be made of.
    """
    if not isinstance(batch, Mapping):
        return f"a batch is a {type(batch).__name__} and no dict, its entries have no names. Let the collator give one"
    # Positions that start anew within a row, and no mask, are how a flattening collator keeps texts apart.
    flattened = "cu_seq_lens_q" in batch or ("position_ids" in batch and "attention_mask" not in batch)
    if flattened and batch_size_of(batch) == 1 < batch_size:
        return (
            f"the data_collator made one row of {batch_size} examples (packing, padding_free, or flattening), so they "
            "cannot be drawn one by one. Let it pad instead"
        )
    return None
