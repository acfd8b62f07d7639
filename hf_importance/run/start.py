"""The one place that reads the Trainer: what a run is made of, and the loader whose batches know their examples."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_importance.batches.indexed import IndexedCollator, IndexedDataset
from hf_importance.batches.pool import Padding
from hf_importance.batches.random import key_to_seed
from hf_importance.batches.reserve import Population, population_of
from hf_importance.checkpoint.state import TENSORS_NAME, load_tensors, saved_state
from hf_importance.checkpoint.whole import STATE_FILE
from hf_importance.checks import stands_in_the_way, unknown_head
from hf_importance.heads.class_weights import ClassWeights
from hf_importance.heads.head import Head
from hf_importance.objective.loss import Objective
from hf_importance.objective.model import alive, can_go_around, scorer_of
from hf_importance.objective.precision import Precision, cheaper_than
from hf_importance.ranks import Ranks, ranks_of
from hf_importance.reporting.best import past_its_best
from hf_importance.reporting.report import Report
from hf_importance.run.clock import Clock
from hf_importance.run.feed import Feed, StreamPlace
from hf_importance.run.ledger import Ledger
from hf_importance.run.pools import Pools
from hf_importance.run.run import Run
from hf_importance.run.saved import resume, schema
from hf_importance.run.step import OFF, Watch
from hf_importance.run.table import Table
from hf_importance.samplers.sampler import Facts, Sampler
from hf_importance.training_args import ImportanceArguments
from hf_importance.transfer import Preparation

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """Begins the run once the model is wrapped and the Trainer's state loaded, and looks at its evaluations."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin, self._training = begin, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        self._training = True
        self._begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is evaluated from here on is looked at by the user."""
        self._training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say it where the run has passed its best evaluation loss."""
        said = past_its_best(state.log_history) if self._training and state.is_world_process_zero else None
        if said is not None:
            logger.warning(said)


def indexed_loader(trainer: Trainer, make: Callable[[], DataLoader]) -> DataLoader:
    """Have the Trainer make its loader around a dataset and a collator that know the examples' indices.

    Args:
        trainer: Its dataset and collator are replaced while the loader is made.
        make: The Trainer's own ``get_train_dataloader``.
    """
    data, collator = trainer.train_dataset, trainer.data_collator
    shared = bool(trainer.args.accelerator_config.dispatch_batches)
    try:
        # Columns that the model does not take are removed here, as the Trainer does it for a dataset of its own.
        if isinstance(data, datasets.Dataset):
            trainer.train_dataset = IndexedDataset(trainer._remove_unused_columns(data, description="training"))
            trainer.data_collator = IndexedCollator(collator, shared)
        else:
            trainer.train_dataset = IndexedDataset(data)
            inner = trainer._get_collator_with_removed_columns(collator, description="training")
            trainer.data_collator = IndexedCollator(inner, shared)
        return make()
    finally:
        trainer.train_dataset, trainer.data_collator = data, collator


def start(
    trainer: Trainer,
    sampler: Sampler,
    objective: Objective,
    settings: ImportanceArguments,
    score: Any,
    folder: Any,
    own_code: tuple[list[str], list[str]],
) -> Run | None:
    """Begin a run, or take one up: the model is wrapped, and the Trainer's state loaded.

    Args:
        trainer: Read here, and referred to weakly: a run must not keep its trainer's model alive.
        sampler: Decides.
        objective: The loss of its model.
        settings: The arguments.
        score: The user's ``compute_score_func``, which takes the place of the sampler's score.
        folder: The checkpoint that is resumed, if any.
        own_code: See :func:`overridden`.

    Returns:
        The run; None where nothing can be drawn, which is said once.

    Raises:
        ValueError: The checkpoint's state cannot be taken up.
    """
    args, loader = trainer.args, trainer.callback_handler.train_dataloader
    ranks, head, objective.weights = ranks_of(trainer), objective.head, ClassWeights()
    assert loader is not None
    population, remembers, reason = _drawn_from(trainer, loader, sampler, head, own_code, ranks)
    finders = ranks.gather_number(int(reason is not None))
    if any(finders) or head is None:
        if ranks.rank == finders.index(1):
            logger.warning(OFF, reason)
        return None
    streaming, batch_size = population is None, _batch_size(trainer, loader, ranks)
    accumulation = args.gradient_accumulation_steps
    micro_batches = 0 if streaming else len(loader)
    updates = math.ceil(micro_batches / accumulation)
    seed = args.seed if args.data_seed is None else args.data_seed
    this = weakref.ref(trainer)

    def skipped() -> int:
        return 0 if args.ignore_data_skip or not updates else alive(this).state.global_step % updates

    # The run knows these facts, so they must not keep it alive.
    that: list[weakref.ref[Run]] = []
    clock = Clock(args.device, ranks, accumulation, loader.num_workers > 0)
    table = Table(len(loader.dataset), ranks) if remembers else None
    padding = _padding(trainer, head)
    scored = settings.scoring_batch_size
    feed = Feed(loader, ranks, padding, seed, batch_size, accumulation, updates, scored, skipped, population)
    # Where the user's own training_step meets every batch, DeepSpeed counts its backward passes, and batches are made
    # to fit into memory by their lengths, each is trained on.
    rebalanced = getattr(args, "train_sampling_strategy", "") == "batch_rebalance"
    apart = "training_step" in own_code[0] or trainer.is_deepspeed_enabled or rebalanced
    feed.gathered = 1 if apart else accumulation
    facts = Facts(
        examples=None if streaming else len(loader.dataset),
        batch_size=batch_size,
        accumulation=accumulation,
        gathered=feed.gathered,
        micro_batches=micro_batches,
        updates=updates,
        fewest=objective.fewest,
        rank=ranks.rank,
        ranks=ranks.size,
        seed=seed,
        table=table,
        clock=clock,
        step=lambda: alive(this).state.global_step,
        steps=lambda: alive(this).state.max_steps,
        place=lambda: feed.place,
        visiting=lambda: feed.visiting,
        drawn=lambda: alive(that[0]).state.drawn,
        draws=lambda: feed.state.draws,
        tau=lambda: alive(that[0]).state.tau,
        score_all=lambda: alive(that[0]).score_all(),
        generator=lambda *key: torch.Generator().manual_seed(key_to_seed(seed, *key)),
    )
    sharded, report = (
        trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        Report(ranks.sum, settings.importance_log == "all"),
    )
    scorer = scorer_of(trainer, head, settings, sampler.score if score is None else score, sharded)
    tried, mixed = settings.scoring_dtype == "auto", trainer.accelerator.mixed_precision not in (None, "no")
    cheaper = cheaper_than(trainer.model, mixed, args.device) if tried else None
    hooks = sorted({*own_code[0], *own_code[1]})
    said = (
        f"{type(trainer).__name__} overrides {', '.join(hooks)}" if hooks else "no hook of the Trainer is overridden"
    )
    pools = Pools(
        sampler,
        scorer,
        objective,
        feed,
        ranks,
        clock,
        facts,
        report,
        prepare=Preparation(
            lambda batch: alive(this)._prepare_inputs(batch), "_prepare_inputs" in hooks, seed, args.device
        ),
        precision=Precision(scorer, ranks, args.device, cheaper),
        waits_in_passes=ranks.size > 1 and sharded,
    )
    watch = Watch(objective, scorer, clock, said, can_go_around(trainer, own_code[0]))
    ledger = Ledger(sampler, objective, watch, feed, ranks, clock, table, facts, report)
    run = Run(sampler, objective, watch, feed, pools, ranks, clock, table, facts, report, ledger)
    that.append(weakref.ref(run))
    saved = _saved(trainer, sampler) if trainer.state.global_step > 0 else None
    sampler.begin(facts)
    if saved is not None:
        tensors = {} if saved["table"] is None or table is None else load_tensors(folder, trainer.state.global_step)
        resume(run, saved, tensors, str(Path(str(folder or "")) / TENSORS_NAME))
    if streaming:
        feed.read_on(*_stream_place(trainer, loader, feed, saved is not None))
    return run


def _drawn_from(
    trainer: Trainer,
    loader: Any,
    sampler: Sampler,
    head: Head | None,
    own_code: tuple[list[str], list[str]],
    ranks: Ranks,
) -> tuple[Population | None, bool, str | None]:
    """Give what the loader draws from, None for a stream; whether scores are remembered; and what is in the way."""
    if not isinstance(loader, DataLoader):
        return None, False, f"its loader is a {type(loader).__name__}, and examples are drawn from torch's DataLoader"
    found = None if isinstance(loader.dataset, IterableDataset) else population_of(loader)
    if head is None:
        return None, False, unknown_head(trainer.model)
    if isinstance(found, str):
        return None, False, found
    if "_get_num_items_in_batch" in {*own_code[0], *own_code[1]}:
        kind = type(trainer).__name__
        return found, False, f"{kind} counts the items of a step by itself (_get_num_items_in_batch)"
    examples = None if found is None else len(found)
    reason = stands_in_the_way(sampler, trainer.args, examples, _batch_size(trainer, loader, ranks))
    remembers = sampler.remembers and found is not None and found.uniform and indexed(loader)
    if reason is None and sampler.needs_memory and not remembers:
        reason = (
            "the loader does not draw all examples alike, or is not the one that ImportanceTrainer makes, so what is "
            "remembered cannot stand for it. Use importance_method='presample'"
        )
    return found, remembers, reason


def indexed(loader: DataLoader) -> bool:
    """Whether the batches of a loader know their examples; a subclass's own loader may not."""
    collate = getattr(loader.collate_fn, "data_collator", loader.collate_fn)  # in the one that removes columns
    return isinstance(loader.dataset, IndexedDataset) and isinstance(collate, IndexedCollator)


def _batch_size(trainer: Trainer, loader: DataLoader, ranks: Ranks) -> int:
    """Give the examples of a micro-batch on each rank; a loader that accelerate did not make has its own."""
    total: int | None = getattr(loader, "total_batch_size", None)
    return total // ranks.size if total else (loader.batch_size or trainer._train_batch_size)


def _padding(trainer: Trainer, head: Head) -> Padding:
    # Who pads knows how: the collator's tokenizer, else the processing class or the tokenizer in it.
    processing = getattr(trainer.data_collator, "tokenizer", None) or trainer.processing_class
    processing = getattr(processing, "tokenizer", processing)
    pad = getattr(processing, "pad_token_id", None)
    if pad is None:
        pad = getattr(getattr(trainer.model, "config", None), "pad_token_id", None)
    labels = dict.fromkeys(("labels", "shift_labels"), head.ignored_label)
    tokens = dict.fromkeys(("input_ids", "decoder_input_ids"), 0 if pad is None else pad)
    # Positions in a text stay right only if what is added comes behind it.
    side = "right" if "start_positions" in head.label_names else getattr(processing, "padding_side", "right")
    unread = frozenset({"labels"}) if getattr(head, "shift", False) else frozenset()
    multiple = getattr(trainer.data_collator, "pad_to_multiple_of", None) or 1
    return Padding(side=side, multiple=multiple, unread_first=unread, values={**labels, **tokens})


def _saved(trainer: Trainer, sampler: Sampler) -> dict[str, Any] | None:
    """Give the checked state of the checkpoint, or None, with a warning, where it has none of this very step."""
    state = trainer.state
    saved = saved_state(state.stateful_callbacks, f"The {STATE_FILE} of the checkpoint", schema(sampler))
    if saved is not None and saved["step"] == state.global_step:
        return saved
    logger.warning(
        "The checkpoint at step %d was not written by ImportanceTrainer%s: importance sampling starts fresh, off, "
        "with tau = 1.",
        state.global_step,
        "" if saved is None else f", whose state in it is that of step {saved['step']}",
    )
    return None


def _stream_place(trainer: Trainer, loader: DataLoader, feed: Feed, saved: bool) -> tuple[int, int, StreamPlace]:
    """Give the Trainer's epoch, the batches of it that it skips, and where the checkpoint left the stream."""
    args, accumulated = trainer.args, trainer.args.gradient_accumulation_steps
    steps = max(-(-len(loader) // accumulated), 1) if has_length(loader) else trainer.state.max_steps
    epoch, trained = divmod(trainer.state.global_step, steps)
    skipped = 0 if args.ignore_data_skip else trained * accumulated
    go_on = saved and not args.ignore_data_skip
    return epoch, skipped, feed.state.stream if go_on else StreamPlace(epoch, skipped)
