"""``ImportanceTrainer``: a ``Trainer`` that spends its backward passes on the examples that still move the model.

::

    own batch ─► on? ── no ─► loss (w = 1) ─► scores of the same logits ───┐
                  │ yes                                                    ├─► sums over ranks ─► τ ─► switch ─► log
                  └─► + reserve ─► score ─► resample ─► weighted loss ─────┘

(``importance_method="history"`` draws by remembered scores instead, with no reserve and no scoring: see
:mod:`hf_importance.remembering`.)

Every step starts from the Trainer's own batch, so epochs, ``max_steps``, the schedule and skipping on resume stay the
Trainer's. While the switch is off nothing else happens, and the run is the plain Trainer's to the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_importance.batch_norm import follow_pool
from hf_importance.batches import (
    WEIGHTS,
    Padding,
    Pool,
    Reserve,
    ReserveDataset,
    batch_size_of,
    key_to_seed,
    reserve_sizes,
    reserve_unit,
    sort_by_length,
)
from hf_importance.cards import extend_card
from hf_importance.checkpoint import (
    ImportanceStateCallback,
    changed_settings,
    load_tensors,
    resumed_position,
    save_tensors,
    saved_state,
)
from hf_importance.checks import NO_ITEMS, check_batch, check_dataset, check_history, check_setup, check_threshold
from hf_importance.kappa import KappaMeter
from hf_importance.lockstep import Lockstep
from hf_importance.planning import PlanningMixin
from hf_importance.presampling import counted, draw, keep_own, score_outputs, score_pool
from hf_importance.progress import show_tau
from hf_importance.remembering import Remembering
from hf_importance.reporting import PREFIX, Report, Totals
from hf_importance.streams import Stream
from hf_importance.switching import Switch, tau_from_sums
from hf_importance.training_args import ImportanceArguments
from hf_importance.visits import IndexedCollator, IndexedDataset
from hf_importance.whole_checkpoints import STATE_FILE, HalfWritten, check_whole, checkpoint_to_resume

logger = logging.getLogger(__name__)


class ImportanceMixin(PlanningMixin):
    """The importance logic, for any subclass of ``Trainer``: ``class MyTrainer(ImportanceMixin, Seq2SeqTrainer)``.

    Overrides ``train``, ``get_train_dataloader``, ``get_batch_samples``, ``training_step``, ``compute_loss``, ``log``,
    ``create_model_card`` and ``save_model``, each of them around ``super()``; copies nothing and patches nothing.

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
        self._compiled: tuple[nn.Module, Callable[..., Any]] | None = None
        self._look_at_model()
        if self._sampling:
            check_setup(self.importance_args, self.args)
            self._state_callback = ImportanceStateCallback(lambda: self._saved_state)
            self.add_callback(self._state_callback)
            show_tau(self, self._current_switch)
            self._begin_importance()
        self._seen_state: object = None

    # ---- State: fresh at every train(), or from the checkpoint that it resumes ----

    def _begin_importance(self) -> None:
        settings = self.importance_args
        self._switch = Switch(settings.threshold, settings.tau_momentum)
        self._meter = KappaMeter(self.args.device)
        self._report = Report(self._sum_over_ranks)
        self._reserve: Reserve | None = None
        self._reserve_start = 0
        self._lockstep: Lockstep | None = None
        self._stream: Stream | None = None
        self._remembering: Remembering | None = None
        self._resumed_history: dict[str, Any] | None = None
        # The state before the step in progress: what is saved in the middle of a step must not hold half of it.
        self._before_step: dict[str, Any] | None = None
        self._saved_state: dict[str, Any] = {}
        self._saved_in: str | None = None
        # What the last step left on the device, of each micro-batch: scores, indices of the examples, item count.
        self._pending: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._awaiting = False
        self._warned_nonfinite = False

    def _follow_state(self) -> None:
        """Begin anew when the Trainer did: it makes a new ``state`` for every run, and loads one to resume."""
        if self.state is self._seen_state:
            return
        self._seen_state = self.state
        self._begin_importance()
        if not hasattr(self, "_train_loader"):  # a subclass makes its own loader without asking for ours
            self._train_loader = self.callback_handler.train_dataloader
        saved = self._state_to_resume() if self.state.global_step > 0 else None
        if saved is not None:
            self._switch.load_state_dict(saved["switch"])
            self._report.totals = Totals(**saved["totals"])
            self._report.steps_on = saved["steps_on"]
            self._loss_scale.over_step = saved["loss_over_step"]
            self._resumed_history = saved["history"]
            self._meter.load(saved["kappa"])
            current = self._settings()
            self._reserve_start = resumed_position(saved["reserve_position"], saved["settings"], current)
            changed = changed_settings(saved["settings"], current)
            self._resumed_as_saved = changed is None
            if changed is not None and self.is_world_process_zero():
                logger.warning(
                    "Resuming from step %d with other settings than it was saved with, so not to the last bit. %s",
                    self.state.global_step,
                    changed,
                )
        if self.importance_args.threshold_follows_kappa:
            self._switch.follow_costs(self._meter.kappa)
        if isinstance(self._train_loader.dataset, IterableDataset):
            self._stream = self._stream_at(saved)
        # The Trainer may have replaced the callback by a copy from the checkpoint, or know none yet.
        self.remove_callback(ImportanceStateCallback)
        self.add_callback(self._state_callback)
        self.state.stateful_callbacks.setdefault(ImportanceStateCallback.__name__, {})

    def _current_switch(self) -> Switch:
        return self._switch

    def _state_to_resume(self) -> dict[str, Any] | None:
        """Give the checked state of the checkpoint, or None, with a warning, where it has none of this very step."""
        saved = saved_state(self.state.stateful_callbacks, f"The {STATE_FILE} of the checkpoint")
        if saved is not None and saved["step"] == self.state.global_step:
            return saved
        logger.warning(
            "The checkpoint at step %d was not written by ImportanceTrainer%s: importance sampling starts fresh, off, "
            "with tau = 1.",
            self.state.global_step,
            "" if saved is None else f", whose state in it is that of step {saved['step']}",
        )
        return None

    def _stream_at(self, saved: dict[str, Any] | None) -> Stream:
        """Give the stream at the place where the checkpoint left it, or where the Trainer goes on."""
        loader, accumulated = self._train_loader, self.args.gradient_accumulation_steps
        steps = max(-(-len(loader) // accumulated), 1) if has_length(loader) else self.state.max_steps
        epoch, trained = divmod(self.state.global_step, steps)
        skipped = 0 if self.args.ignore_data_skip else trained * accumulated
        if saved is None or self.args.ignore_data_skip:
            return Stream(loader, epoch, skipped, epoch, skipped)
        return Stream(loader, epoch, skipped, **saved["stream"])

    def _settings(self) -> dict[str, Any]:
        """Give what a run can be resumed with another value of, by the names in ``checkpoint.SETTINGS``."""
        given, data = self.importance_args, self._train_loader.dataset
        return {
            "importance_method": given.importance_method,
            "importance_score": given.importance_score,
            "presample_ratio": given.presample_ratio,
            "resampling": given.resampling,
            "tau_threshold": given.threshold,
            "tau_momentum": given.tau_momentum,
            "per_device_train_batch_size": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "world_size": self.args.world_size,
            "seed": self._data_seed,
            "train_dataset length": None if isinstance(data, IterableDataset) else len(data),
        }

    def _live_state(self, stream: dict[str, int]) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "switch": self._switch.state_dict(),
            "steps_on": self._report.steps_on,
            "reserve_position": self._reserve_start if self._reserve is None else self._reserve.position,
            "kappa": self._meter.kappa if self._meter.measured else None,
            "stream": stream,
            "loss_over_step": self._loss_scale.over_step,
            "history": None if self._remembering is None else self._remembering.history.state_dict(),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; for a checkpoint, first bring the state up to date, on all ranks.

        A folder that is written over loses what makes it look whole first: ``trainer_state.json`` and each rank's
        random state, which the Trainer writes last.
        """
        # Only the Trainer itself calls it on all ranks; a user may well do so on one.
        if self._sampling and _internal_call and self.is_in_train and self.state is self._seen_state:
            if output_dir is not None:
                self._saved_in = output_dir
                if self.args.should_save:
                    Path(output_dir, STATE_FILE).unlink(missing_ok=True)
                Path(output_dir, f"rng_state_{self.args.process_index}.pth").unlink(missing_ok=True)
            state = self._before_step
            if state is None or state["step"] != self.state.global_step:
                self._settle()
                self._report.mark()
                state = self._live_state(self._stream_place())
            totals = dataclasses.asdict(self._report.marked())
            if self._remembering is not None:
                self._remembering.exchange()
                if output_dir is not None and self.args.should_save:
                    save_tensors(output_dir, self._remembering.history.tensors(), self.state.global_step)
            self._saved_state = {**state, "totals": totals, "settings": self._settings()}
        super().save_model(output_dir, _internal_call)

    def _stream_place(self) -> dict[str, int]:
        return {"passes": 0, "drawn": 0} if self._stream is None else self._stream.place()

    # ---- The step ----

    def get_train_dataloader(self) -> DataLoader:
        """Give the Trainer's own loader, after checking that its dataset can be drawn from.

        With the history method its batches carry the indices of their examples; else it is untouched.
        """
        if self.model_init is not None:  # train() has made a new model
            self._look_at_model()
        data, settings = self.train_dataset, self.importance_args
        if self._remembers:
            check_history(data, self.args)
            self._train_loader = self._indexed_loader()
            return self._train_loader
        if self._sampling and data is not None and not isinstance(data, IterableDataset):
            if self._train_batch_size != self.args.train_batch_size:  # auto_find_batch_size
                check_threshold(settings, self.args, self._train_batch_size)
            check_dataset(len(data), self._train_batch_size, settings.ratio)
        self._train_loader = super().get_train_dataloader()
        return self._train_loader

    def _indexed_loader(self) -> DataLoader:
        """Have the Trainer make its loader around a dataset and a collator that know the examples' indices."""
        data, collator = self.train_dataset, self.data_collator
        try:
            # Columns that the model does not take are removed here, as the Trainer does it for a dataset of its own.
            if isinstance(data, datasets.Dataset):
                self.train_dataset = IndexedDataset(self._remove_unused_columns(data, description="training"))
                self.data_collator = IndexedCollator(collator)
            else:
                self.train_dataset = IndexedDataset(data)
                inner = self._get_collator_with_removed_columns(collator, description="training")
                self.data_collator = IndexedCollator(inner)
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = data, collator

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of one optimizer step, and draw them by importance while that is on.

        Returns:
            The micro-batches, and the number of items that the step's loss is divided by.
        """
        self._step_items = None
        if self._sampling:
            self._follow_state()
            self._place = self._stream_place()
            given = epoch_iterator
            if self._stream is not None:
                epoch_iterator = self._stream.follow(epoch_iterator)
            epoch_iterator = self._in_step(epoch_iterator, num_batches, given)
            if self._remembers and self._draws_by_history(epoch_iterator):
                return self._remembered(num_batches)
        self._step_mark = self._mark()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._head is None or not batches:
            return batches, num_items
        if not self._sampling and any(name not in batches[0] for name in self._head.label_names):
            self._leave_loss_to_trainer()
            return batches, num_items
        self._head.labels(batches[0])
        # On several ranks always: they may learn the scale at different steps, and must all take part in the sum.
        if self._ranks > 1 or (num_batches > 1 and (not self._loss_scale.over_step or WEIGHTS in batches[0])):
            self._step_items = torch.stack([self._loss_scale.items(batch) for batch in batches]).sum()
        return (self._drawn(batches, epoch_iterator) if self._sampling else None) or (batches, num_items)

    def _mark_step(self) -> None:
        self._before_step = self._live_state(self._place)
        self._report.mark()

    def _drawn(self, batches: list, epoch_iterator: Iterator) -> tuple[list, Tensor] | None:
        """Draw one optimizer step's micro-batches anew while presampling is on; None: they are trained on as is."""
        if self.state.global_step == 0:
            check_batch(batches[0], self._train_batch_size)
        if self._remembers or not self._switch.active:
            self._settle(counting=True)
        self._learn_kappa()
        self._mark_step()
        self._report.step(self._switch.active)
        if self._switch.active:
            return self._presample(batches, epoch_iterator)
        self._probe(batches, self._step_mark)
        for batch in batches:
            self._report.uniform_batch(batch_size_of(batch))
        self._awaiting = True
        return None

    # ---- Drawing by remembered scores ----

    @property
    def _remembers(self) -> bool:
        return self._sampling and self.importance_args.importance_method == "history"

    def _draws_by_history(self, epoch_iterator: Iterator) -> bool:
        """Give whether this step is drawn by remembered scores. All ranks must call it."""
        if self._remembering is None:
            self._remembering = Remembering(
                self.importance_args,
                self._train_loader,
                self.args.gradient_accumulation_steps,
                self.args.process_index,
                self._ranks,
                self._data_seed,
                self._gather_rows,
            )
            if self._resumed_history is not None:
                tensors = load_tensors(self._resumed_folder, self.state.global_step)
                self._remembering.resume(self._resumed_history, tensors, self._resumed_as_saved)
                self._switch.turn(self._remembering.history.current is not None)
        skipped = 0 if self.args.ignore_data_skip else self.state.global_step % self._remembering.updates
        self._remembering.begin_step(epoch_iterator, skipped)
        if self._remembering.at_decision:
            self._settle()
            if self._switch.turn(self._remembering.decide()):
                self._log_switch()
        return self._switch.active

    def _remembered(self, num_batches: int) -> tuple[list, Tensor]:
        """Give the micro-batches of one optimizer step of a pass."""
        remembering = self._remembering
        self._settle()
        self._mark_step()
        batches = remembering.take(num_batches)
        self._report.step(True)
        for _, weights in remembering.handed:
            self._report.weighted_batch(weights, len(weights), remembering.batch_size)
        examples = sum(len(weights) for _, weights in remembering.handed)
        # The items that a uniform step of so many examples would have counted.
        self._step_items = examples * self._averaged_ranks * remembering.items_an_example
        self._awaiting = True
        return batches, torch.tensor(self._step_items, device=self.args.device)

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate rows over all ranks, of which each may have another number; on the CPU."""
        if self._ranks == 1:
            return rows
        padded = self.accelerator.pad_across_processes(rows.to(self.args.device), dim=0, pad_index=-1)
        gathered = self.accelerator.gather(padded).cpu()
        return gathered[gathered[:, 0] >= 0]

    # ---- Presampling ----

    def _in_step(self, epoch_iterator: Iterator, num_batches: int, epoch: object) -> Iterator:
        """Give the iterator, ended where it ends on another rank in this epoch."""
        if self._ranks == 1:
            return epoch_iterator
        if self._lockstep is None:
            self._lockstep = Lockstep(self.callback_handler.train_dataloader, self.accelerator)
        return self._lockstep.take(epoch_iterator, num_batches, epoch)

    def _presample(self, batches: list, epoch_iterator: Iterator) -> tuple[list, Tensor]:
        """Replace each micro-batch by examples drawn by importance from itself and the reserve."""
        started = time.perf_counter()
        planned = self._plan()
        share = planned.kept / self._train_batch_size
        pools = []
        for batch in batches:
            own_and_reserve = [batch, *self._reserve_batches(epoch_iterator, planned.pool)]
            pools.append(Pool([self._prepare_inputs(part) for part in own_and_reserve], self._padding()))
        examples = sum(len(pool) for pool in pools)
        self._meter.add("wait", self._step_mark, examples)
        mark = self._mark()
        scores, items = self._score(pools, self._passes(planned.pool))
        together = torch.cat(scores)
        # What a uniform step would have counted in expectation, and what the own batches count.
        shares = sum(float(found.sum()) * pool.sizes[0] / len(pool) for pool, found in zip(pools, items, strict=True))
        counts = [shares, sum(float(found[0]) for found in items)]
        summed = self._sum_over_ranks([len(together), float(together.sum()), float(together.square().sum()), *counts])
        finite = self._average_tau(*summed[:3])
        drawn = []
        for micro, (pool, pool_scores) in enumerate(zip(pools, scores, strict=True)):
            if finite:
                seed = key_to_seed(self._data_seed, self.args.process_index, self.state.global_step, micro, 2)
                generator = torch.Generator().manual_seed(seed)
                kept = max(round(share * pool.sizes[0]), 1)
                found = draw(pool, pool_scores, self.importance_args.resampling, generator, kept, share)
            else:
                found = keep_own(pool, share)
            self._report.weighted_batch(found.weights, found.distinct, pool.sizes[0])
            drawn.append(found.batch)
        step_items = share * (summed[3:] if self._averaged_ranks > 1 else counts)[0 if finite else 1]
        if step_items == 0:
            raise ValueError(NO_ITEMS.format(step=self.state.global_step + 1))
        self._step_items = step_items
        self._meter.add("score", mark, examples)
        self._report.scored(examples, time.perf_counter() - started)
        return drawn, torch.tensor(step_items, device=self.args.device)

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

    def _score_pool(self, pool: Pool, passes: int = 0) -> Tensor:
        settings = self.importance_args
        size = settings.scoring_batch_size
        if size is None and settings.ratio is None:
            size = self._train_batch_size  # the reserve then comes in smaller pieces
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
            self._compiled = self.model, torch.compile(self.model, backend=backend, mode=mode)
        return self._compiled[1]

    def _passes(self, pool: int) -> int:
        """Forward passes that scoring a pool takes on every rank, where one may find fewer batches than another."""
        sharded = self._ranks > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not (sharded and isinstance(self._train_loader.dataset, IterableDataset)):
            return 0
        size = self._train_batch_size
        batches = 1 + -(-(pool - size) // size)
        return math.ceil(size * batches / (self.importance_args.scoring_batch_size or size))

    def _keep_scores(self, outputs: Any, batch: dict[str, Any], index: Tensor | None) -> None:
        """Keep, on the device, what the logits of a training pass say."""
        settings = self.importance_args
        score = score_outputs(outputs, batch, self._head, settings.importance_score, self.compute_score_func)
        self._pending.append((counted(score, batch), index, self._loss_scale.items(batch)))

    # ---- τ and the log ----

    def _settle(self, counting: bool = False) -> None:
        """Read what the last step left on the device and average its τ in. All ranks must call it.

        Args:
            counting: Also sum the items of the step to come over the ranks, in the same collective.
        """
        counting = counting and self._averaged_ranks > 1
        if not (self._awaiting or counting):
            return
        awaited, self._awaiting = self._awaiting, False
        own, pending = self._read_pending()
        # The one collective of a uniform step.
        *summed, items = self._sum_over_ranks([*own, float(self._step_items) if counting else 0.0])
        if counting:
            self._step_items = items
        if awaited:
            self._take_in(*summed)
        if pending is not None and self._remembering is not None:
            self._remembering.record(*pending, self.state.global_step)

    def _read_pending(self) -> tuple[list[float], tuple[Tensor, Tensor] | None]:
        """Give this rank's sums of the last step, see :meth:`_take_in`, and the examples and scores behind them."""
        pending, self._pending = self._pending, []
        if not pending:
            return [0.0] * 7, None
        sizes = [len(score) for score, _, _ in pending]
        # The one wait for the device of a uniform step.
        host = torch.cat([*(score for score, _, _ in pending), *(items.float()[None] for _, _, items in pending)])
        found, items = host.cpu().double().split([sum(sizes), len(sizes)])
        empty = 0.0 if self._loss_scale.over_step else float((items == 0).sum())
        weights, history = torch.ones_like(found), self._remembering
        index, drawn = None, 0.0
        if history is not None:
            if self._switch.active:
                index = torch.cat([index for index, _ in history.handed]).long()
                weights = torch.cat([weights for _, weights in history.handed]).double()
                found = found / weights  # the batch brought its weights along
                drawn = float((weights * found).square().sum())
            else:
                index = torch.cat([index for _, index, _ in pending]).cpu()
                drawn = float((history.history.proposed_weights(index) * found.square()).sum())
        sums = [float(weights.sum()), float((weights * found).sum()), float((weights * found.square()).sum())]
        own = [*sums, drawn, empty, float(items.sum()), float(len(found))]
        return own, None if index is None else (index, found)

    def _take_in(
        self, count: float, total: float, squares: float, drawn: float, empty: float, items: float, examples: float
    ) -> None:
        """Average in the sums of one optimizer step over all ranks.

        Args:
            count: Σ w over its examples; w is 1 where they were drawn uniformly.
            total: Σ w Ĝ.
            squares: Σ w Ĝ².
            drawn: Σ w² Ĝ², with the weights that the table would have given where they were drawn uniformly.
            empty: Micro-batches whose own mean was 0 / 0.
            items: Items of the loss.
            examples: Examples.
        """
        if empty > 0 or (items == 0 and examples > 0):
            raise ValueError(NO_ITEMS.format(step=self.state.global_step))
        if not self._average_tau(count, total, squares):
            return
        if self._remembering is not None:
            uniform = not self._switch.active
            self._remembering.measure(count, squares, drawn, items * uniform, examples * uniform)

    def _average_tau(self, count: float, total: float, squares: float) -> bool:
        """Average in the τ of one step's sums over all ranks; give whether its scores were finite."""
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
        if count and self._remembers:
            self._switch.average(tau)
        elif count and self._switch.update(tau):
            self._log_switch()
        return True

    def _log_switch(self) -> None:
        """Tell the log and the reporting backends that importance sampling went on or off."""
        switch, entries = self._switch, self._method_entries()
        if self.is_world_process_zero():
            what = ", ".join(f"{name} {value:.3f}" for name, value in entries.items())
            logger.info(
                "Importance sampling %s after step %d: tau %.3f, %s.",
                "on" if switch.active else "off",
                self.state.global_step,
                switch.tau,
                what,
            )
        names = {"active": float(switch.active), "switches": switch.switches, "tau": switch.tau}
        self.log({PREFIX + name: value for name, value in names.items()})

    def _method_entries(self) -> dict[str, float]:
        if self._remembering is None:
            return {"tau_threshold": self._switch.threshold, "kappa": self._meter.kappa}
        return self._remembering.log_entries(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with the figures of importance sampling at every training log."""
        if self._sampling and self.is_in_train and "loss" in logs:
            self._settle()
            logs.update(self._report.drain(self._switch, self._method_entries()))
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does; the reserve's workers, and what was set on BatchNorm layers, end with the run.

        A checkpoint is resumed from only if it is whole: True takes the newest that is, and warns of those it passes
        over.

        Raises:
            ValueError: The checkpoint is half-written, or its state of importance sampling cannot be taken up.
        """
        if self._sampling and resume_from_checkpoint:
            resume_from_checkpoint, passed_over = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
            if passed_over and self.is_world_process_zero():
                found = " ".join(map(str, passed_over))
                logger.warning("Resuming from %s, not from what is newer. %s", resume_from_checkpoint, found)
        self._resumed_folder = resume_from_checkpoint
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._sampling:
                self._report_savings()
            return result
        except BaseException:
            self._say_what_is_half_written()
            raise
        finally:
            self._hold_batch_norm(training=True, weights=None)
            if self._sampling and self._reserve is not None:
                self._reserve_start, self._reserve = self._reserve.position, None

    def _report_savings(self) -> None:
        totals = self._report.totals
        uniform = totals.examples_trained + totals.examples_saved
        if self.is_world_process_zero() and uniform:
            logger.info(
                "Trained on %d examples where uniform sampling takes %d (%.1f %%), and scored %d in forward passes of "
                "their own.",
                totals.examples_trained,
                uniform,
                100 * totals.examples_trained / uniform,
                totals.examples_scored,
            )

    def _say_what_is_half_written(self) -> None:
        """Training failed, perhaps on a full disk: say which checkpoint that leaves behind half-written."""
        if not self._sampling or self._saved_in is None or not self.args.should_save:
            return
        try:
            check_whole(Path(self._saved_in))
        except HalfWritten as error:
            logger.error(
                "%s Older checkpoints are as they were: resume_from_checkpoint=True takes the newest whole one.", error
            )


class ImportanceTrainer(ImportanceMixin, Trainer):
    """``transformers.Trainer`` with importance sampling: swap the two words, change nothing else."""
