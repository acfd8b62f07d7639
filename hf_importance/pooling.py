"""Importance steps by fresh scores: a pool is put together, scored in a forward pass without gradients, drawn from."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_importance.batch_norm import follow_pool
from hf_importance.batches import (
    Padding,
    Pool,
    Reserve,
    ReserveDataset,
    key_to_seed,
    reserve_sizes,
    reserve_unit,
    sort_by_length,
    split_evenly,
)
from hf_importance.checks import NO_ITEMS
from hf_importance.costs import relative_variance
from hf_importance.learning_rate import learning_rate_factor
from hf_importance.planning import FEW, PlanningMixin
from hf_importance.presampling import draw, keep_own, score_pool
from hf_importance.visits import without_index


class PoolingMixin(PlanningMixin):
    """Draws the micro-batches of an optimizer step from scored pools."""

    _reserve: Reserve | None
    _compiled: tuple[Any, Callable[..., Any]] | None
    # The table of scores, where pools' scores are remembered too.
    _remembering: Any
    # What this step scored, for the table once the step is done: examples, scores, weights, sums over ranks. Until
    # then the table is what a checkpoint in the middle of the step holds.
    _scored: tuple[Tensor, Tensor, Tensor, list[float] | None] | None = None

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # What the learning rate of the optimizer step in progress is multiplied by.
    _learning_rate_factor = 1.0

    def _scale_learning_rate(self, gain: float) -> None:
        """Follow the gain of the step in progress, where the user asked for it."""
        rule = self.importance_args.learning_rate_scaling
        if rule is not None:
            self._learning_rate_factor = learning_rate_factor(gain, rule)

    def _reserve_batches(self, epoch_iterator: Iterator, pool: int) -> list[Any]:
        """Give the batches that complete one pool: from the reserve, or from the stream where the dataset is one.

        Texts that are still on the host come sorted by length.
        """
        settings, size, loader = self.importance_args, self._train_batch_size, self._train_loader
        if isinstance(loader.dataset, IterableDataset):
            return list(itertools.islice(epoch_iterator, -(-(pool - size) // size)))
        sizes = reserve_sizes(size, settings.ratio, len(loader.dataset))
        if self._reserve is None:
            source = ReserveDataset(loader.dataset, loader.collate_fn, sizes, self._data_seed, self.args.process_index)
            ahead = 8 if settings.ratio is None else len(sizes)  # two batches where they come in quarters
            self._reserve = Reserve(source, loader, self._reserve_start, ahead)
        wanted = (pool - size) // reserve_unit(size) if settings.ratio is None else len(sizes)
        batches = list(itertools.islice(self._reserve, wanted))
        return sort_by_length(batches, settings.scoring_batch_size or size, self._padding()) or batches

    def _padding(self) -> Padding:
        # Who pads knows how: the collator's tokenizer, else the processing class or the tokenizer in it.
        processing = getattr(self.data_collator, "tokenizer", None) or self.processing_class
        processing = getattr(processing, "tokenizer", processing)
        pad = getattr(processing, "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        labels = dict.fromkeys(("labels", "shift_labels"), self._head.ignored_label)
        tokens = dict.fromkeys(("input_ids", "decoder_input_ids"), 0 if pad is None else pad)
        # Positions in a text stay right only if what is added comes behind it.
        side = "right" if "start_positions" in self._head.label_names else getattr(processing, "padding_side", "right")
        unread = frozenset({"labels"}) if getattr(self._head, "shift", False) else frozenset()
        return Padding(side=side, unread_first=unread, values={**labels, **tokens})

    def _presample(self, batches: list, epoch_iterator: Iterator) -> tuple[list, Tensor]:
        """Replace each micro-batch by examples drawn by importance from itself and the reserve."""
        started = time.perf_counter()
        planned = self._plan()
        share = planned.kept / self._train_batch_size
        self._timed_as = "few" if share <= FEW else None
        pools, indices = self._gather_pools(batches, epoch_iterator, planned.pool)
        examples = sum(len(pool) for pool in pools)
        wait, score = self._pool_parts
        self._meter.add(wait, self._step_mark, examples)
        mark = self._mark(later=self._meter.measured)
        scores, items = self._score(pools, self._passes(planned.pool, pools[0]))
        together = torch.cat(scores)
        # What a uniform step would have counted in expectation, and what the own batches count.
        shares = sum(float(found.sum()) * pool.sizes[0] / len(pool) for pool, found in zip(pools, items, strict=True))
        counts = [shares, sum(float(found[0]) for found in items)]
        index = torch.cat([part.cpu() for part in indices]) if indices else None
        own = [len(together), float(together.sum()), float(together.square().sum()), *counts]
        parts = [own, self._table_sums(index, together, items), self._inverse_moments(scores)]
        added = iter(self._sum_over_ranks(list(itertools.chain(*parts))))
        summed, table_sums, moments = (list(itertools.islice(added, len(part))) for part in parts)
        gain = 1.0
        if self.importance_args.learning_rate_scaling is not None:
            # By what earlier steps say: by its own scores a step's length would be biased.
            gain /= relative_variance(planned.pool, planned.kept, self._train_batch_size, self._variance_factor)
        finite = self._average_tau(*summed[:3], moments)
        if finite:
            self._scale_learning_rate(gain)
        else:
            self._timed_as = None  # all of the own batch is trained on
        drawn, weights = [], []
        for micro, (pool, pool_scores) in enumerate(zip(pools, scores, strict=True)):
            if finite:
                seed = key_to_seed(self._data_seed, self.args.process_index, self.state.global_step, micro, 2)
                generator = torch.Generator().manual_seed(seed)
                kept = max(round(share * pool.sizes[0]), 1)
                given = self.importance_args
                found = draw(pool, pool_scores, given.resampling, generator, kept, share, given.weight_exponent)
            else:
                found = keep_own(pool, share)
            self._report.weighted_batch(found.weights, found.distinct, pool.sizes[0])
            drawn.append(found.batch)
            if index is not None:
                weights.append(torch.zeros(len(pool)).index_add_(0, found.rows, found.weights))
        if index is not None:
            sums = [summed[0], summed[2], *table_sums] if finite else None
            self._scored = index, together, torch.cat(weights).double(), sums
        step_items = share * (summed[3:5] if self._averaged_ranks > 1 else counts)[0 if finite else 1]
        if step_items == 0:
            raise ValueError(NO_ITEMS.format(step=self.state.global_step + 1))
        self._step_items = step_items
        self._meter.add(score, mark, examples)
        self._report.scored(examples, time.perf_counter() - started)
        return drawn, torch.tensor(step_items, device=self.args.device)

    def _gather_pools(self, batches: list, epoch_iterator: Iterator, size: int) -> tuple[list[Pool], list[Tensor]]:
        """Put the pool of each micro-batch together; give the examples' indices too, where batches carry them."""
        pools, indices = [], []
        for batch in batches:
            parts = [without_index(part) for part in [batch, *self._reserve_batches(epoch_iterator, size)]]
            pools.append(Pool([self._prepare_inputs(part) for part, _ in parts], self._padding()))
            indices += [index for _, index in parts if index is not None]
        return pools, indices

    def _remember_pools(self) -> None:
        """Put into the table what the last step scored."""
        scored, self._scored = self._scored, None
        if scored is not None:
            *rows, sums = scored
            self._remembering.record(*rows, self.state.global_step)
            if sums is not None:
                self._remembering.measure(*sums)

    def _table_sums(self, index: Tensor | None, scores: Tensor, items: list[Tensor]) -> list[float]:
        """Give what the table's gain is measured by: Σ w Ĝ² with the weights it would have given, items, examples."""
        if index is None:
            return []
        moment = float((self._remembering.history.proposed_weights(index) * scores.square()).sum())
        return [moment, float(torch.cat(items).sum()), len(scores)]

    def _score(self, pools: list[Pool], passes: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """Give the scores of each pool, and the item count of each of its batches; on the CPU, float64."""
        settings, scores, items = self.importance_args, [], []
        following = self._batch_norm if settings.batch_norm in ("batch", "weighted", "running") else []
        if self._weighted_batch_norm is not None:
            self._weighted_batch_norm.weights = None
        for pool in pools:
            with follow_pool(following, self._sum_tensor_over_ranks):
                scores.append(self._score_pool(pool, passes))
            items += [self._loss_scale.items(batch) for batch in pool.batches]
        # The one wait for the device of an importance step: scores and counts come to the host together.
        on_host = torch.cat([*scores, torch.stack(items)]).cpu().double()
        sizes = [len(pool) for pool in pools]
        all_scores, all_items = on_host.split([sum(sizes), len(items)])
        return list(all_scores.split(sizes)), list(all_items.split([len(pool.sizes) for pool in pools]))

    def _largest_pass(self, pool: Pool) -> int | None:
        """Give the examples that a scoring pass takes at most; None: those of one batch as it came."""
        settings = self.importance_args
        if settings.scoring_batch_size is not None or settings.ratio is not None:
            return settings.scoring_batch_size
        # The reserve comes in quarters of a batch, and a pass of its own for one or two of them is dear: MobileNetV2
        # takes 0.24 of a training step for 32 and 4 pictures, 0.20 for 36 (CPU, bf16). Without gradients no
        # activations are kept, so two batches need less memory than training on one. Texts would be padded to the
        # longest of all.
        return self._train_batch_size * (1 if pool.in_lengths else 2)

    def _score_pool(self, pool: Pool, passes: int = 0) -> Tensor:
        settings, size = self.importance_args, self._largest_pass(pool)
        if size is not None and not pool.in_lengths:
            size = split_evenly(len(pool), size)[0]
        return score_pool(
            # DeepSpeed's engine, so that ZeRO-3 gathers the parameters; FSDP's module is self.model itself. DDP's
            # wrapper would only synchronise buffers once more.
            self.model_wrapped if self.is_deepspeed_enabled else self.model,
            pool,
            self._head,
            settings.importance_score,
            self.compute_score_func,
            size,
            self._sliced_head,
            settings.scoring_dtype,
            self._compiled_model(),
            passes,
        )

    def _compiled_model(self) -> Callable[..., Any] | None:
        """Give the model as ``torch_compile`` compiles it, without what wraps it for several ranks, or None.

        Where running statistics follow the pool, hooks have to run, which a compiled model leaves out.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        hooked = self._batch_norm and self.importance_args.batch_norm in ("batch", "weighted", "running")
        if not self.args.torch_compile or sharded or hooked:
            return None
        if self._compiled is None or self._compiled[0] is not self.model:
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            compiled = torch.compile(self.model, backend=backend, mode=mode)  # pyrefly: ignore[no-matching-overload]
            self._compiled = self.model, compiled
        return self._compiled[1]

    def _passes(self, planned: int, pool: Pool) -> int:
        """Forward passes that scoring a pool takes on every rank, where one may find fewer batches than another."""
        sharded = self._ranks > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not (sharded and isinstance(self._train_loader.dataset, IterableDataset)):
            return 0
        size = self._train_batch_size
        batches = 1 + -(-(planned - size) // size)
        return math.ceil(size * batches / (self._largest_pass(pool) or size))
