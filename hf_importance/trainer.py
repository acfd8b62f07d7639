"""``ImportanceTrainer``: a ``Trainer`` that spends its backward passes on the examples that still move the model.

::

    own batch ─► on? ── no ─► loss (w = 1) ─► scores of the same logits ───┐
                  │ yes                                                    ├─► sums over ranks ─► τ ─► switch ─► log
                  └─► + reserve ─► score ─► resample ─► weighted loss ─────┘

(``importance_method="history"`` draws by remembered scores instead, with no reserve and no scoring: see
:mod:`hf_importance.remembering`. ``"auto"`` takes whichever is cheaper.)

Every step starts from the Trainer's own batch, so epochs, ``max_steps``, the schedule and skipping on resume stay the
Trainer's. While the switch is off nothing else happens, and the run is the plain Trainer's to the last bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_importance.batches import WEIGHTS, batch_size_of
from hf_importance.cards import extend_card
from hf_importance.checkpoint import ImportanceStateCallback
from hf_importance.checks import NO_ITEMS, check_batch, check_dataset, check_history, check_setup, check_threshold
from hf_importance.learning_rate import LearningRateCallback
from hf_importance.lockstep import Lockstep
from hf_importance.presampling import counted, score_outputs
from hf_importance.progress import Status, show_tau
from hf_importance.reporting import PREFIX
from hf_importance.resuming import ResumingMixin
from hf_importance.switching import tau_from_sums
from hf_importance.training_args import BASELINES, PRESAMPLING, REMEMBERING, ImportanceArguments

logger = logging.getLogger(__name__)


class ImportanceMixin(ResumingMixin):
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
        self._compiled = None
        self._look_at_model()
        if self._sampling:
            check_setup(self.importance_args, self.args)
            self._state_callback = ImportanceStateCallback(lambda: self._saved_state)
            self.add_callback(self._state_callback)
            if self.importance_args.learning_rate_scaling is not None:
                self.add_callback(LearningRateCallback(lambda: self._learning_rate_factor))
            show_tau(self, self._status)
            self._begin_importance()
        self._seen_state = None

    # ---- The step ----

    def get_train_dataloader(self) -> DataLoader:
        """Give the Trainer's own loader, after checking that its dataset can be drawn from.

        Where scores are remembered its batches carry the indices of their examples; else it is untouched.
        """
        if self.model_init is not None:  # train() has made a new model
            self._look_at_model()
        data, settings = self.train_dataset, self.importance_args
        if not self._sampling or data is None:
            self._train_loader = super().get_train_dataloader()
            return self._train_loader
        if settings.importance_method in REMEMBERING:
            check_history(data, settings, self.args)
        if settings.importance_method in PRESAMPLING and not isinstance(data, IterableDataset):
            if self._train_batch_size != self.args.train_batch_size:  # auto_find_batch_size
                check_threshold(settings, self.args, self._train_batch_size)
            check_dataset(len(data), self._train_batch_size, settings.ratio)
        self._train_loader = self._indexed_loader() if self._remembers else super().get_train_dataloader()
        return self._train_loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of one optimizer step, and draw them by importance while that is on.

        Returns:
            The micro-batches, and the number of items that the step's loss is divided by.
        """
        self._step_items = None
        self._learning_rate_factor = 1.0
        self._timed_as = None
        if self._sampling:
            self._follow_state()
            self._place = self._stream_place()
            given = epoch_iterator
            if self._stream is not None:
                epoch_iterator = self._stream.follow(epoch_iterator)
            epoch_iterator = self._in_step(epoch_iterator, num_batches, given)
            if self._remembers and self._draws_by_history(epoch_iterator):
                return self._remembered(num_batches)
        self._step_mark = self._mark() or self._mark(later=True)
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

    def _drawn(self, batches: list, epoch_iterator: Iterator) -> tuple[list, Tensor] | None:
        """Draw one optimizer step's micro-batches anew while presampling is on; None: they are trained on as is."""
        if self.state.global_step == 0:
            check_batch(batches[0], self._train_batch_size)
        if self._switch.active:
            self._remember_pools()
        else:
            self._settle(counting=True)
        self._learn_kappa()
        self._mark_step()
        self._report.step(self._switch.active)
        if self._switch.active:
            return self._presample(batches, epoch_iterator)
        self._timed_as = "train"
        self._probe(batches, self._step_mark)
        for batch in batches:
            self._report.uniform_batch(batch_size_of(batch))
        self._awaiting = True
        return None

    def _in_step(self, epoch_iterator: Iterator, num_batches: int, epoch: object) -> Iterator:
        """Give the iterator, ended where it ends on another rank in this epoch."""
        if self._ranks == 1:
            return epoch_iterator
        if self._lockstep is None:
            self._lockstep = Lockstep(self.callback_handler.train_dataloader, self.accelerator)
        return self._lockstep.take(epoch_iterator, num_batches, epoch)

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
        self._remember_pools()
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

    def _read_pending(self) -> tuple[list[float], tuple[Tensor, Tensor, Tensor] | None]:
        """Give this rank's sums of the last step, see :meth:`_take_in`, and the examples and scores behind them."""
        pending, self._pending = self._pending, []
        if not pending:
            return [0.0] * 7 + self._inverse_moments([]), None
        sizes = [len(score) for score, _, _ in pending]
        # The one wait for the device of a uniform step.
        host = torch.cat([*(score for score, _, _ in pending), *(items.float()[None] for _, _, items in pending)])
        found, items = host.cpu().double().split([sum(sizes), len(sizes)])
        empty = 0.0 if self._loss_scale.over_step else float((items == 0).sum())
        given = weights = torch.ones_like(found)
        history = self._remembering
        index, drawn = None, 0.0
        if history is not None:
            if history.active:
                index = torch.cat([index for index, _ in history.handed]).long()
                given = torch.cat([given for _, given in history.handed]).double()
                found = found / given  # the batch brought its weights along
                weights = history.undoing.double()
            else:
                index = torch.cat([index for _, index, _ in pending]).cpu()
            proposed = weights.square() if history.drawn else history.history.proposed_weights(index)
            drawn = float((proposed * found.square()).sum())
        sums = [float(weights.sum()), float((weights * found).sum()), float((weights * found.square()).sum())]
        own = [*sums, drawn, empty, float(items.sum()), float(len(found)), *self._step_moments(found, weights)]
        return own, None if index is None else (index, found, given)

    def _take_in(
        self,
        count: float,
        total: float,
        squares: float,
        drawn: float,
        empty: float,
        items: float,
        examples: float,
        *moments: float,
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
            *moments: See :func:`.variance.inverse_moments`.
        """
        if empty > 0 or (items == 0 and examples > 0):
            raise ValueError(NO_ITEMS.format(step=self.state.global_step))
        if not self._average_tau(count, total, squares, moments):
            return
        if self._remembering is not None:
            uniform = not self._revisiting
            self._remembering.measure(count, squares, drawn, items * uniform, examples * uniform)

    def _average_tau(self, count: float, total: float, squares: float, moments: Sequence[float]) -> bool:
        """Average in one step's sums over all ranks; give whether its scores were finite."""
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
        if moments:
            self._variance.average(moments)
        if count and self._turn(tau):
            self._log_switch()
        return True

    def _turn(self, tau: float) -> bool:
        """Average in the τ of one step, and give whether presampling goes on or off by it."""
        method, priced = self.importance_args.importance_method, self.importance_args.goes_by_price
        if method == "presample" and not priced:
            return self._switch.update(tau)
        self._switch.average(tau)
        # A pass of remembered scores ends by itself.
        presampling = method in PRESAMPLING and not self._revisiting
        return presampling and self._switch.turn(self._presampling_pays())

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

    def _status(self) -> Status:
        """Say where the run stands, for the progress bar."""
        switch, method = self._switch, self.importance_args.importance_method
        if method == "presample":
            limit = f"{'>' if switch.active else '<'} {switch.threshold:.2f}" if switch.threshold else None
            compared = limit or f"price {self._presampling_price():.2f}"
            return Status(switch.tau, compared, "on" if switch.active else "off")
        if method in BASELINES:
            return Status(switch.tau, method, "on" if switch.active else "off")
        gain = 1.0 if self._remembering is None else self._remembering.history.averages.gain
        source = "history" if not self._presampling else "presample"
        on = "on" if method == "history" else source
        return Status(switch.tau, f"gain {gain:.2f}", on if switch.active else "off")

    def _method_entries(self) -> dict[str, float]:
        method, entries = self.importance_args.importance_method, {}
        if method == "presample" and self._switch.threshold is not None:
            entries["tau_threshold"] = self._switch.threshold
        if method in PRESAMPLING:
            entries["kappa"] = self._meter.kappa
            if self._meter.overhead is not None:
                entries["overhead"] = self._meter.overhead
            if self.importance_args.goes_by_price:
                entries["price_presample"] = self._presampling_price()
        if method == "auto":
            entries["presampling"] = float(self._presampling)
        if self._remembering is not None:
            entries |= self._remembering.log_entries(self.state.global_step)
        return entries

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with the figures of importance sampling at every training log."""
        if self._sampling and self.is_in_train and "loss" in logs:
            self._settle()
            logs.update(self._report.drain(self._switch, self._method_entries()))
            if self.importance_args.learning_rate_scaling is not None:
                logs[PREFIX + "learning_rate_factor"] = self._learning_rate_factor
        elif self._sampling and self.is_in_train and "train_runtime" in logs:  # also what train() returns
            logs.update(self._report.summary(self._meter.kappa if self._meter.measured else None))
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


class ImportanceTrainer(ImportanceMixin, Trainer):
    """``transformers.Trainer`` with importance sampling: swap the two words, change nothing else."""
