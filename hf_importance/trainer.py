"""``ImportanceTrainer``: a ``Trainer`` that spends its backward passes on the examples that still move the model.

::

    own batch ─► on? ── no ─► loss (w = 1) ─► scores of the same logits ───┐
                  │ yes                                                    ├─► 3 sums over ranks ─► τ ─► switch ─► log
                  └─► + reserve ─► score ─► resample ─► weighted loss ─────┘

Every step starts from the Trainer's own batch, so epochs, ``max_steps``, the schedule and skipping on resume stay the
Trainer's. While the switch is off nothing else happens, and the run is the plain Trainer's to the last bit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_importance.batch_norm import follow_pool
from hf_importance.batches import (
    WEIGHTS,
    Padding,
    Pool,
    Reserve,
    ReserveDataset,
    batch_size_of,
    key_to_seed,
    split_evenly,
)
from hf_importance.cards import extend_card
from hf_importance.checkpoint import ImportanceStateCallback, saved_state
from hf_importance.checks import NO_ITEMS, check_batch, check_dataset, check_setup, check_threshold
from hf_importance.presampling import counted, draw, keep_own, score_outputs, score_pool
from hf_importance.progress import show_tau
from hf_importance.reporting import PREFIX, Report, Totals
from hf_importance.switching import Switch, tau_from_sums
from hf_importance.training_args import ImportanceArguments
from hf_importance.weighted_loss import WeightedLossMixin

logger = logging.getLogger(__name__)


class ImportanceMixin(WeightedLossMixin):
    """The importance logic, for any subclass of ``Trainer``: ``class MyTrainer(ImportanceMixin, Seq2SeqTrainer)``.

    Overrides ``get_train_dataloader``, ``get_batch_samples``, ``compute_loss``, ``log`` and ``save_model``, each of
    them around ``super()``; copies nothing and patches nothing.

    Args:
        *args: As ``Trainer`` takes them. ``args`` may be an :class:`ImportanceTrainingArguments` or any
            ``TrainingArguments``, which gets the defaults.
        compute_score_func: ``compute_score_func(outputs, labels)`` giving one non-negative score an example, shape
            ``(b,)``, in place of ``importance_score``. Where it is not proportional to the gradient's norm, the
            gradient stays unbiased and its variance grows.
        **kwargs: As ``Trainer`` takes them.

    Raises:
        ValueError: The model's loss is not known to split by example, importance sampling could never switch on at
            the given ``tau_threshold``, or the model would run under ``DataParallel``.
    """

    def __init__(
        self, *args: Any, compute_score_func: Callable[[Any, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        given = self.args
        self.importance_args = given if isinstance(given, ImportanceArguments) else ImportanceArguments()
        self.compute_score_func = compute_score_func
        self._sampling = self.importance_args.importance_sampling
        self._look_at_model()
        if self._sampling:
            check_setup(self.importance_args, self.args)
            self._state_callback = ImportanceStateCallback(self._importance_state_dict)
            self.add_callback(self._state_callback)
            show_tau(self, self._current_switch)
            self._begin_importance()
        self._seen_state: object = None

    # ---- State: fresh at every train(), or from the checkpoint that it resumes ----

    def _begin_importance(self) -> None:
        settings = self.importance_args
        self._switch = Switch(settings.threshold, settings.tau_momentum)
        self._report = Report(self._sum_over_ranks)
        self._reserve: Reserve | None = None
        self._reserve_start = 0
        # What the last uniform step left on the device: the scores and the item count of each micro-batch.
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._awaiting = False
        self._warned_nonfinite = False

    def _follow_state(self) -> None:
        """Begin anew when the Trainer did: it makes a new ``state`` for every run, and loads one to resume."""
        if self.state is self._seen_state:
            return
        self._seen_state = self.state
        self._begin_importance()
        if self.state.global_step > 0:
            saved = saved_state(self.state)
            if saved is None:
                logger.warning(
                    "The checkpoint at step %d was not written by ImportanceTrainer: importance sampling starts "
                    "fresh, off, with tau = 1.",
                    self.state.global_step,
                )
            else:
                self._switch.load_state_dict(saved["switch"])
                self._report.totals = Totals(**saved["totals"])
                self._report.steps_on = saved.get("steps_on", 0)  # since version 0.1.0
                self._reserve_start = saved["reserve_position"]
                self._loss_scale.over_step = saved["loss_over_step"]
        # The Trainer may have replaced the callback by a copy from the checkpoint, or know none yet.
        self.remove_callback(ImportanceStateCallback)
        self.add_callback(self._state_callback)
        self.state.stateful_callbacks.setdefault(ImportanceStateCallback.__name__, {})

    def _current_switch(self) -> Switch:
        return self._switch

    def _importance_state_dict(self) -> dict[str, Any]:
        position = self._reserve_start if self._reserve is None else self._reserve.position
        return {
            "switch": self._switch.state_dict(),
            "totals": dataclasses.asdict(self._report.totals),
            "steps_on": self._report.steps_on,
            "reserve_position": position,
            "loss_over_step": self._loss_scale.over_step,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; first bring the state up to date, on all ranks, for the checkpoint it may be part of."""
        if self._sampling and self.is_in_train and self.state is self._seen_state:
            self._settle()
            self._report.sync()
        super().save_model(output_dir, _internal_call)

    # ---- The step ----

    def get_train_dataloader(self) -> DataLoader:
        """Give the Trainer's own loader, untouched, after checking that a pool can be drawn from its dataset."""
        if self.model_init is not None:  # train() has made a new model
            self._look_at_model()
        data = self.train_dataset
        if self._sampling and data is not None and not isinstance(data, IterableDataset):
            if self._train_batch_size != self.args.train_batch_size:  # auto_find_batch_size
                check_threshold(self.importance_args, self.args, self._train_batch_size)
            check_dataset(len(data), self._train_batch_size, self.importance_args.presample_ratio)
        self._train_loader = super().get_train_dataloader()
        return self._train_loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of one optimizer step, and draw them by importance while that is on.

        Returns:
            The micro-batches, and the number of items that the step's loss is divided by.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_items = None
        if self._head is None or not batches:
            return batches, num_items
        if self._sampling:
            self._follow_state()
            self._settle()
            self._head.labels(batches[0])
            if self.state.global_step == 0:
                check_batch(batches[0], self._train_batch_size)
            self._report.step(self._switch.active)
            if self._switch.active:
                return self._presample(batches, epoch_iterator)
            for batch in batches:
                self._report.uniform_batch(batch_size_of(batch))
            self._awaiting = True
        if any(name not in batches[0] for name in self._head.label_names):
            self._leave_loss_to_trainer()
        elif self._ranks > 1 or (num_batches > 1 and (not self._loss_scale.over_step or WEIGHTS in batches[0])):
            # On several ranks always: they may learn the scale at different steps, and must all take part in the sum.
            self._step_items = self._count_items(batches)
        return batches, num_items

    def _presample(self, batches: list, epoch_iterator: Iterator) -> tuple[list, Tensor]:
        """Replace each micro-batch by one of its size, drawn by importance from itself and the reserve."""
        started = time.perf_counter()
        pools = []
        for batch in batches:
            own_and_reserve = [batch, *self._reserve_batches(epoch_iterator)]
            pools.append(Pool([self._prepare_inputs(part) for part in own_and_reserve], self._padding()))
        scores, items = self._score(pools)
        together = torch.cat(scores)
        finite = self._update_tau(len(together), float(together.sum()), float(together.square().sum()))
        drawn, step_items = [], 0.0
        for micro, (pool, pool_scores, pool_items) in enumerate(zip(pools, scores, items, strict=True)):
            if finite:
                seed = key_to_seed(self._data_seed, self.args.process_index, self.state.global_step, micro, 2)
                generator = torch.Generator().manual_seed(seed)
                found = draw(pool, pool_scores, pool_items, self.importance_args.resampling, generator)
            else:
                found = keep_own(pool, pool_items)
            self._report.weighted_batch(found.weights, found.distinct, pool.sizes[0])
            drawn.append(found.batch)
            step_items += found.items
        if step_items == 0:
            raise ValueError(NO_ITEMS.format(step=self.state.global_step + 1))
        if self.args.average_tokens_across_devices:
            (step_items,) = self._sum_over_ranks([step_items])
        self._step_items = step_items
        self._report.scored(len(together), time.perf_counter() - started)
        return drawn, torch.tensor(step_items, device=self.args.device)

    def _score(self, pools: list[Pool]) -> tuple[list[Tensor], list[Tensor]]:
        """Give the scores of each pool, and the item count of each of its batches; on the CPU, float64."""
        settings, scores, items = self.importance_args, [], []
        following = self._batch_norm if settings.batch_norm in ("batch", "weighted", "running") else []
        if self._weighted_batch_norm is not None:
            self._weighted_batch_norm.weights = None
        for pool in pools:
            with follow_pool(following, self._sum_tensor_over_ranks):
                scores.append(
                    score_pool(
                        self.model,
                        pool,
                        self._head,
                        settings.importance_score,
                        self.compute_score_func,
                        settings.scoring_batch_size,
                        self._sliced_head,
                    )
                )
            items += [self._loss_scale.items(batch) for batch in pool.batches]
        # The one wait for the device of an importance step: scores and counts come to the host together.
        on_host = torch.cat([*scores, torch.stack(items)]).cpu().double()
        sizes = [len(pool) for pool in pools]
        all_scores, all_items = on_host.split([sum(sizes), len(items)])
        return list(all_scores.split(sizes)), list(all_items.split([len(pool.sizes) for pool in pools]))

    def _keep_scores(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Keep, on the device, what the logits of a uniform training pass say."""
        settings = self.importance_args
        score = score_outputs(outputs, batch, self._head, settings.importance_score, self.compute_score_func)
        self._pending.append((counted(score, batch), self._head.items(batch)))

    # ---- τ and the log ----

    def _settle(self) -> None:
        """Read what the last uniform step left on the device and average its τ in. All ranks must call it."""
        if not self._awaiting:
            return
        self._awaiting = False
        count, total, squares = 0, 0.0, 0.0
        if self._pending:
            found = torch.cat([score for score, _ in self._pending])
            items = torch.stack([item for _, item in self._pending])
            self._pending = []
            count = len(found)
            total, squares, fewest, all_items = torch.stack(
                [found.sum(), found.square().sum(), items.min(), items.sum()]
            ).tolist()
            if all_items == 0 or (fewest == 0 and not self._loss_scale.over_step):
                raise ValueError(NO_ITEMS.format(step=self.state.global_step))
        self._update_tau(count, total, squares)

    def _update_tau(self, count: float, total: float, squares: float) -> bool:
        """Average in the τ of one step over all ranks; give whether its scores were finite, and log a switch."""
        count, total, squares = self._sum_over_ranks([count, total, squares])
        tau = tau_from_sums(count, total, squares)
        if math.isnan(tau):
            if self.args.process_index == 0:
                self._report.nonfinite()
            if not self._warned_nonfinite:
                self._warned_nonfinite = True
                logger.warning(
                    "Step %d: a score is NaN or infinite, so this step trains uniformly and tau stays at %.3f. Such "
                    "steps are counted in %snonfinite_steps; this warning comes once. Usual causes: overflow in fp16, "
                    "a learning rate that is too high, NaN in the data.",
                    self.state.global_step,
                    self._switch.tau,
                    PREFIX,
                )
            return False
        if count and self._switch.update(tau):
            switch = self._switch
            if self.is_world_process_zero():
                logger.info(
                    "Importance sampling %s after step %d: tau %.3f, threshold %.3f.",
                    "on" if switch.active else "off",
                    self.state.global_step,
                    switch.tau,
                    switch.threshold,
                )
            names = {"active": float(switch.active), "switches": switch.switches, "tau": switch.tau}
            self.log({PREFIX + name: value for name, value in names.items()})
        return True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with the figures of importance sampling at every training log."""
        if self._sampling and self.is_in_train and "loss" in logs:
            self._settle()
            logs.update(self._report.drain(self._switch))
        elif self._sampling and self.is_in_train and "train_runtime" in logs:  # also what train() returns
            logs.update(self._report.summary())
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, baseline: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the Trainer's card, with a section on importance sampling; ``push_to_hub`` passes its arguments on.

        Args:
            *args: As ``Trainer`` takes them.
            baseline: Metrics of a uniform run of the same script, by name (``eval_accuracy``), to stand beside the
                last evaluation's.
            **kwargs: As ``Trainer`` takes them.
        """
        super().create_model_card(*args, **kwargs)
        if self._sampling and self.is_world_process_zero():
            extend_card(self.args.output_dir, self.importance_args, self.state.log_history, baseline)

    # ---- Data ----

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _reserve_batches(self, epoch_iterator: Iterator) -> Iterator[Any]:
        """Give the batches that complete one pool: from the reserve, or from the stream where the dataset is one."""
        size = self._train_batch_size
        sizes = split_evenly(math.ceil(size * self.importance_args.presample_ratio) - size, size)
        loader = self._train_loader
        if isinstance(loader.dataset, IterableDataset):
            for _, batch in zip(sizes, epoch_iterator, strict=False):
                yield batch
            return
        if self._reserve is None:
            source = ReserveDataset(loader.dataset, loader.collate_fn, sizes, self._data_seed, self.args.process_index)
            self._reserve = Reserve(source, loader, self._reserve_start)
        for _ in sizes:
            yield next(self._reserve)

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does; the reserve's workers, and what was set on BatchNorm layers, end with the run."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._hold_batch_norm(training=True, weights=None)
            if self._sampling and self._reserve is not None:
                self._reserve_start, self._reserve = self._reserve.position, None


class ImportanceTrainer(ImportanceMixin, Trainer):
    """``transformers.Trainer`` with importance sampling: swap the two words, change nothing else."""
