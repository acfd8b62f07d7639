"""``ImportanceTrainer``: a ``Trainer`` that spends its backward passes on the examples that still move the model.

::

    own batch ─► on? ── no ─────────────────────► loss (w = 1) ─► scores of the same logits ─┐
                  │ yes                                                                      ├─► 3 sums over ranks ─►
                  τ ─► log └─► + reserve ─► score (no grad) ─► resample ─► weighted loss ─────────────┘

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

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
from hf_importance.checkpoint import ImportanceStateCallback, saved_state
from hf_importance.heads import CLASSIFICATION_TASKS, Head, head_of, labels_of
from hf_importance.losses import IGNORED_LABEL
from hf_importance.normalisation import LossScale
from hf_importance.presampling import draw, score_batch, score_pool, without_labels
from hf_importance.reporting import PREFIX, Report, Totals
from hf_importance.switching import Switch, tau_from_sums
from hf_importance.training_args import ImportanceArguments

logger = logging.getLogger(__name__)


class ImportanceMixin(Trainer):
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
        self._head = self._choose_head()
        if self._head is not None:
            self._loss_scale = LossScale(self._head)
            # compute_loss below gives every micro-batch its share of the step, so training_step must not divide again.
            self.loss_is_scaled_for_ga = True
        if self._sampling:
            _refuse_what_cannot_work(self.importance_args, self.args)
            self._state_callback = ImportanceStateCallback(self._importance_state_dict)
            self.add_callback(self._state_callback)
            self._begin_importance()
        self._seen_state: object = None
        self._step_items: Tensor | float | None = None

    def _choose_head(self) -> Head | None:
        model = self.accelerator.unwrap_model(self.model)
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        head = head_of(model, smoothing, self.compute_loss_func)
        if head is None and self._sampling:
            raise ValueError(
                f"Importance sampling needs the loss of each example, and does not know how that of "
                f"{type(model).__name__} splits. Known are models whose class name ends in "
                f"{' or '.join(CLASSIFICATION_TASKS)}. What to do: pass a compute_loss_func(outputs, labels, "
                "num_items_in_batch) that is a sum over examples divided by num_items_in_batch, or train as the plain "
                "Trainer does with importance_sampling=False."
            )
        return head

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
                self._reserve_start = saved["reserve_position"]
        # The Trainer may have replaced the callback by a copy from the checkpoint, or know none yet.
        self.remove_callback(ImportanceStateCallback)
        self.add_callback(self._state_callback)
        self.state.stateful_callbacks.setdefault(ImportanceStateCallback.__name__, {})

    def _importance_state_dict(self) -> dict[str, Any]:
        position = self._reserve_start if self._reserve is None else self._reserve.position
        return {
            "switch": self._switch.state_dict(),
            "totals": dataclasses.asdict(self._report.totals),
            "reserve_position": position,
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
        loader = super().get_train_dataloader()
        if self._sampling:
            self._train_loader = loader
            if not isinstance(loader.dataset, IterableDataset):
                self._refuse_small_dataset(len(loader.dataset))
        return loader

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
            labels_of(batches[0])
            self._report.step(self._switch.active)
            if self._switch.active:
                return self._presample(batches, epoch_iterator)
            for batch in batches:
                self._report.uniform_batch(batch_size_of(batch))
            self._awaiting = True
        if (num_batches > 1 or self._ranks > 1) and "labels" in batches[0] and not self._loss_scale.over_step:
            self._step_items = self._count_items(batches)
        return batches, num_items

    def _presample(self, batches: list, epoch_iterator: Iterator) -> tuple[list, Tensor]:
        """Replace each micro-batch by one of its size, drawn by importance from itself and the reserve."""
        started = time.perf_counter()
        settings, head = self.importance_args, self._head
        pools, found, counted = [], [], []
        for batch in batches:
            own_and_reserve = [batch, *self._reserve_batches(epoch_iterator)]
            pool = Pool([self._prepare_inputs(part) for part in own_and_reserve], self._padding())
            pools.append(pool)
            found.append(
                score_pool(
                    self.model,
                    pool,
                    head,
                    settings.importance_score,
                    self.compute_score_func,
                    settings.scoring_batch_size,
                )
            )
            counted += [head.items(part) for part in pool.batches]
        # The one wait for the device of an importance step: scores and counts come to the host together.
        on_host = torch.cat([*found, torch.stack(counted)]).double().cpu()
        all_scores, items = on_host.split([sum(map(len, pools)), len(counted)])
        finite = self._update_tau(len(all_scores), float(all_scores.sum()), float(all_scores.square().sum()))
        drawn, step_items, start = [], 0.0, 0
        for micro, (pool, pool_scores) in enumerate(
            zip(pools, all_scores.split([len(pool) for pool in pools]), strict=True)
        ):
            size = pool.sizes[0]
            pool_items = items[start : start + len(pool.sizes)]
            start += len(pool.sizes)
            if finite:
                seed = key_to_seed(self._data_seed, self.args.process_index, self.state.global_step, micro, 2)
                generator = torch.Generator().manual_seed(seed)
                batch, weights, distinct = draw(pool, pool_scores, size, settings.resampling, generator)
                step_items += float(pool_items.sum()) * size / len(pool)
            else:
                weights, distinct = torch.ones(size), size
                batch = {**pool.batches[0], WEIGHTS: weights.to(found[0].device)}
                step_items += float(pool_items[0])
            self._report.weighted_batch(weights, distinct)
            drawn.append(batch)
        if step_items == 0:
            raise ValueError(_NO_ITEMS.format(step=self.state.global_step + 1))
        if self.args.average_tokens_across_devices:
            (step_items,) = self._sum_over_ranks([step_items])
        self._step_items = step_items
        self._report.scored(len(all_scores), time.perf_counter() - started)
        return drawn, torch.tensor(step_items, device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss as ``Trainer`` does, weighted by the batch's ``importance_weights``, if any.

        In training it keeps the scores that the logits give on the way, and sees to it that the loss is a mean over
        the items of the whole optimizer step also for models that ignore ``num_items_in_batch``.
        """
        if self._head is None or not (model.training or WEIGHTS in inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # the Trainer takes the labels out of `inputs` for label smoothing
        if WEIGHTS in inputs:
            loss, outputs = self._weighted_loss(model, batch)
        else:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            loss = self._normalised(loss, outputs, batch, num_items_in_batch)
        if self._sampling and self._awaiting and model.training:
            score = score_batch(
                outputs, batch, self._head, self.importance_args.importance_score, self.compute_score_func
            )
            self._pending.append((score, self._head.items(batch)))
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        outputs = model(**without_labels(batch))
        total = (batch[WEIGHTS] * self._head.losses(outputs, batch)).sum()
        if model.training and self._step_items is not None:
            return total / self._step_items * self._averaged_ranks, outputs
        return total / self._head.items(batch), outputs

    def _normalised(self, loss: Tensor, outputs: Any, batch: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Bring the model's own loss of a micro-batch to a mean over the step."""
        takes_items = num_items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        # The Trainer has multiplied by the number of ranks already where it gave the model the count over all of them.
        multiplied = self._averaged_ranks if takes_items else 1
        scale = self._loss_scale
        if not scale.checked and (self._sampling or self._step_items is not None):
            try:
                scale.learn(loss.detach() / multiplied, outputs, batch, num_items if takes_items else None)
            except ValueError:
                if self._sampling:
                    raise
                # Nobody asked for importance sampling: whatever the loss is, it is the plain Trainer's.
                self._head, self.loss_is_scaled_for_ga, self._step_items = None, type(self).loss_is_scaled_for_ga, None
                return loss
        if self._step_items is None:
            return loss
        return scale.rescale(loss, batch, self._step_items, self._averaged_ranks // multiplied)

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
                raise ValueError(_NO_ITEMS.format(step=self.state.global_step))
        self._update_tau(count, total, squares)

    def _update_tau(self, count: int, total: float, squares: float) -> bool:
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
        super().log(logs, start_time)

    # ---- Ranks, data ----

    @property
    def _ranks(self) -> int:
        return self.accelerator.num_processes // self.get_tp_size()

    @property
    def _averaged_ranks(self) -> int:
        """Number of ranks that an item count spans, so that a sum divided by it must be multiplied by again."""
        return self._ranks if self.args.average_tokens_across_devices else 1

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        """Add up numbers over all ranks in one collective; on one rank nothing crosses any network."""
        if self._ranks == 1:
            return values
        return self.accelerator.reduce(torch.tensor(values, device=self.args.device), "sum").tolist()

    def _count_items(self, batches: list) -> Tensor:
        items = torch.stack([self._head.items(batch) for batch in batches]).sum().to(self.args.device)
        if self._averaged_ranks > 1:
            items = self.accelerator.reduce(items, "sum")
        return items

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
        processing, config = self.processing_class, getattr(self.model, "config", None)
        pad = getattr(processing, "pad_token_id", None)
        if pad is None:
            pad = getattr(config, "pad_token_id", None)
        return Padding(
            side=getattr(processing, "padding_side", "right"),
            values={"labels": IGNORED_LABEL, "input_ids": 0 if pad is None else pad},
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does; the reserve's workers end with the run."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._sampling and self._reserve is not None:
                self._reserve_start, self._reserve = self._reserve.position, None

    def _refuse_small_dataset(self, examples: int) -> None:
        size, ratio = self._train_batch_size, self.importance_args.presample_ratio
        pool = math.ceil(size * ratio)
        if examples < pool:
            raise ValueError(
                f"train_dataset has {examples} examples, fewer than the pool of {pool} that an importance step scores "
                f"(presample_ratio={ratio:g} times a batch of {size}). What to do: lower per_device_train_batch_size "
                "or presample_ratio, or train with importance_sampling=False."
            )


class ImportanceTrainer(ImportanceMixin, Trainer):
    """``transformers.Trainer`` with importance sampling: swap the two words, change nothing else."""


_NO_ITEMS = (
    "Step {step}: every label of a batch is ignored (-100), so its loss is 0 / 0. Remove such examples from "
    "train_dataset, or see whether the data_collator should have made labels for them."
)


def _refuse_what_cannot_work(settings: ImportanceArguments, args: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which Trainer would use through DataParallel; importance "
            f"sampling needs one process a GPU. Start the script with: accelerate launch --num_processes {args.n_gpu} "
            "script.py, or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
        )
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    highest = math.sqrt(examples)
    if settings.threshold < highest:
        return
    message = (
        f"tau is measured on the {examples} examples of one optimizer step while importance sampling is off, so it "
        f"cannot pass {highest:.3g}, and the {{which}} tau_threshold of {settings.threshold:.3g} is never passed. "
        f"What to do: take more than {settings.threshold**2:.3g} examples an optimizer step "
        f"(per_device_train_batch_size, gradient_accumulation_steps), or a tau_threshold below {highest:.3g}."
    )
    if settings.tau_threshold is not None:
        raise ValueError(message.format(which="given"))
    logger.warning("Importance sampling will stay off: %s", message.format(which="derived"))
