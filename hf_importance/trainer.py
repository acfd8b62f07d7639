"""``ImportanceTrainer``: a ``Trainer`` that spends its backward passes on the examples that still move the model.

::

    own batch ─► on? ── no ─► loss (w = 1) ─► scores of the same logits ───┐
                  │ yes                                                    ├─► sums over ranks ─► τ ─► switch ─► log
                  └─► + reserve ─► score ─► keep ─► weighted loss ─────────┘

Here are the Trainer's hooks and nothing else. A *sampler* decides which examples a step trains on
(:mod:`.samplers.sampler`), and a *run* does what it says (:mod:`.run.run`, where a step can be read). Every step
starts from the Trainer's own batch, so epochs, ``max_steps``, the schedule and skipping on resume stay the Trainer's.
While it is off nothing else happens, and the run is the plain Trainer's to the last bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_importance.batches.entries import without_index
from hf_importance.checkpoint.state import ImportanceStateCallback
from hf_importance.checks import check_data, check_setup, unknown_head
from hf_importance.objective.loss import Objective
from hf_importance.reporting.cards import extend_card
from hf_importance.reporting.progress import Status, show_status
from hf_importance.run.run import Run
from hf_importance.run.saved import folder_to_resume, save, say_what_is_half_written
from hf_importance.run.start import RunCallback, indexed_loader, objective_of, start
from hf_importance.samplers.choose import chosen
from hf_importance.samplers.sampler import Sampler
from hf_importance.training_args import ImportanceArguments


class ImportanceMixin(Trainer):
    """The importance logic, for any subclass of ``Trainer``: ``class MyTrainer(ImportanceMixin, Seq2SeqTrainer)``.

    Overrides ``train``, ``get_train_dataloader``, ``get_batch_samples``, ``training_step``, ``compute_loss``, ``log``,
    ``create_model_card`` and ``save_model``, each of them around ``super()``; copies nothing and patches nothing.

    Args:
        *args: As ``Trainer`` takes them. ``args`` may be an :class:`ImportanceTrainingArguments` or any
            ``TrainingArguments``, which gets the defaults.
        sampler: What decides which examples are trained on, in place of ``importance_method``.
        compute_score_func: ``compute_score_func(outputs, labels)`` giving one non-negative score an example, shape
            ``(b,)``, in place of ``importance_score``. Where it is not proportional to the gradient's norm, the
            gradient stays unbiased and its variance grows.
        **kwargs: As ``Trainer`` takes them.

    Attributes:
        importance_args: The fields of :class:`ImportanceArguments`, the user's or the defaults.
        sampler: What decides.

    Raises:
        ValueError: The model's loss is not known to split by example, importance sampling could never switch on at
            the given ``tau_threshold``, both a sampler and a method were given, or the model would run under
            ``DataParallel``.
    """

    def __init__(
        self,
        *args: Any,
        sampler: Sampler | None = None,
        compute_score_func: Callable[[Any, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        given = self.args
        self.importance_args = given if isinstance(given, ImportanceArguments) else ImportanceArguments()
        self.compute_score_func = compute_score_func
        self._given_sampler = sampler
        self._said: set[str] = set()  # warnings of arguments without effect
        self._run: Run | None = None
        self._folders: dict[str, Any] = {}  # that was resumed from, that was last saved into
        self.sampler = chosen(self.importance_args, sampler, self._said)
        self._look_at_model()
        if self.importance_args.importance_sampling:
            check_setup(self.sampler, self.args)
            this = weakref.ref(self)
            self._state_callback = ImportanceStateCallback()
            self.add_callback(self._state_callback)
            self.add_callback(RunCallback(lambda: this()._begin_run()))
            show_status(self, lambda: this()._status())

    # ---- What a run is made of ----

    def _look_at_model(self) -> None:
        self._objective: Objective = objective_of(self, self.importance_args)
        if self._objective.head is not None:
            # compute_loss below gives every micro-batch its share of the step, so training_step must not divide again.
            self.loss_is_scaled_for_ga = True
        elif self.importance_args.importance_sampling:
            raise ValueError(unknown_head(self.model))

    def _leave_loss_to_trainer(self) -> None:
        self.loss_is_scaled_for_ga = type(self).loss_is_scaled_for_ga

    def _begin_run(self) -> None:
        settings, folder = self.importance_args, self._folders.get("resumed")
        self._run = start(self, self.sampler, self._objective, settings, self.compute_score_func, folder)
        # The Trainer may have replaced the callback by a copy from the checkpoint. Each keeps its place: the list is
        # being gone through, and what moved up would miss the event.
        known = self.callback_handler.callbacks
        known[:] = [self._state_callback if isinstance(one, ImportanceStateCallback) else one for one in known]
        self.state.stateful_callbacks.setdefault(ImportanceStateCallback.__name__, {})

    def get_train_dataloader(self) -> DataLoader:
        """Give the Trainer's own loader; where scores are remembered its batches know their examples."""
        if self.model_init is not None:  # train() has made a new model
            self._look_at_model()
        if self.is_in_train and self._run is None:  # a search over arguments has set those of this trial
            self.sampler = chosen(self.importance_args, self._given_sampler, self._said)
        data, own = self.train_dataset, super().get_train_dataloader
        if not self.importance_args.importance_sampling or data is None:
            return own()
        remembers = check_data(self.sampler, data, self.args, self._train_batch_size)
        return indexed_loader(self, own) if remembers else own()

    # ---- A step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of one optimizer step, drawn by importance while that is on, and their items."""

        def own(iterator: Iterator) -> tuple[list, Any]:
            return super(ImportanceMixin, self).get_batch_samples(iterator, num_batches, device)

        if self._run is not None:
            return self._run.batches(epoch_iterator, num_batches, own)
        batches, items = own(epoch_iterator)
        known = self._objective.head is not None
        self._objective.count(batches)
        if known and self._objective.head is None:
            self._leave_loss_to_trainer()
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch as ``Trainer`` does, and time it while that tells what scoring costs."""
        if self._run is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with self._run.clock.training_on(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss as ``Trainer`` does, weighted by the batch's ``importance_weights``, if any.

        In training it is a mean over the items of the whole optimizer step, and the outputs are scored.
        """
        batch, index = without_index(inputs)
        objective, run = self._objective, self._run
        objective.hold_batch_norm(model.training)

        def own(given: dict[str, Any], wanted: bool) -> Any:
            return super(ImportanceMixin, self).compute_loss(
                model, given, return_outputs=wanted, num_items_in_batch=num_items_in_batch
            )

        if not objective.applies(model.training, batch):
            return own(batch, return_outputs)
        listens = run is not None and run.listens and model.training
        loss, outputs = objective.loss(own, model, batch, return_outputs or listens, num_items_in_batch)
        if objective.head is None:  # it knows no more than the Trainer
            self._leave_loss_to_trainer()
        elif listens and run is not None:
            run.saw(outputs, batch, index)
        return (loss, outputs) if return_outputs else loss

    # ---- Log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with the figures of importance sampling at every training log."""
        if self._run is not None and self.is_in_train:
            if "loss" in logs:
                logs.update(self._run.log_entries())
            elif "train_runtime" in logs:  # also what train() returns
                logs.update(self._run.summary())
        super().log(logs, start_time)

    def _status(self) -> Status:
        return Status(1.0, "", "off") if self._run is None else Status(*self._run.status())

    def importance_table(self) -> datasets.Dataset:
        """Give what is remembered of each training example, ready to sort and to join; any rank may call it alone.

        Within a run on several ranks it is as of their last exchange, at most a tenth of an epoch ago or at the
        beginning of the visits in progress. After the run it holds everything.

        Returns:
            A row an example, in the order of ``train_dataset``: ``index``; ``score`` of its last visit, NaN where it
            was never seen; ``age``, optimizer steps since; ``visits``, how often it was trained on; ``weight_sum``,
            the sum of the weights that it had.

        Raises:
            ValueError: Nothing was remembered: another method, or no training yet.
        """
        table = None if self._run is None else self._run.up_to_date_table()
        if table is None:
            raise ValueError(
                "importance_table() gives what a sampler has remembered, such as importance_method='history', and "
                f"nothing was: train first, with such a method (it is {type(self.sampler).__name__})."
            )
        return table.as_dataset(self.state.global_step)

    def importance_weights(self) -> Tensor | None:
        """Count this process's weights by the half octave from ``2 ** -7`` to ``2 ** 7``, int64, shape ``(28,)``."""
        return None if self._run is None else self._run.report.weight_counts

    def create_model_card(self, *args: Any, baseline: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the Trainer's card, with a section on importance sampling; ``push_to_hub`` passes its arguments on.

        Args:
            *args: As ``Trainer`` takes them.
            baseline: Metrics of a uniform run of the same script, by name (``eval_accuracy``), to compare with.
            **kwargs: As ``Trainer`` takes them.
        """
        super().create_model_card(*args, **kwargs)
        if self.importance_args.importance_sampling and self.is_world_process_zero():
            extend_card(self.args.output_dir, self.importance_args, self.state.log_history, baseline)

    # ---- Save and resume ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; for a checkpoint, first bring the state up to date, on all ranks."""
        # Only the Trainer itself calls it on all ranks; a user may well do so on one.
        if self._run is not None and _internal_call and self.is_in_train:
            self._folders["saved"] = output_dir
            self._state_callback.saved = save(self._run, output_dir, self.args.should_save)
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does, from a whole checkpoint only, and say in one sentence how it went.

        Raises:
            ValueError: The checkpoint is half-written, or its state of importance sampling cannot be taken up.
        """
        self.sampler, self._run = chosen(self.importance_args, self._given_sampler, self._said), None
        if self.importance_args.importance_sampling and resume_from_checkpoint:
            resume_from_checkpoint = folder_to_resume(resume_from_checkpoint, self.args.output_dir, self.sampler)
        self._folders = {"resumed": resume_from_checkpoint}
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            say_what_is_half_written(self._folders.get("saved"), self.args.should_save, self.sampler)
            raise
        finally:
            self._objective.hold_batch_norm(training=True)
            if self._run is not None:
                self._run.feed.close()
        if self._run is not None:
            self._run.say_how_it_went()
        return result


class ImportanceTrainer(ImportanceMixin):
    """``transformers.Trainer`` with importance sampling: swap the two words, change nothing else."""
