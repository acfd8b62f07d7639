"""``ImportanceTrainer``: a ``Trainer`` that spends its backward passes on the examples that still move the model.

Here are the Trainer's hooks and nothing else. A *sampler* decides which examples a step trains on
(:mod:`.samplers.sampler`), and a *run* does what it says (:mod:`.run.run`, where a step can be read). Every step
starts from the Trainer's own batch, so epochs, ``max_steps``, the schedule and skipping on resume stay the Trainer's.
While it is off nothing else happens, and the run is the plain Trainer's to the last bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_importance.batches.entries import without_index
from hf_importance.checkpoint.state import ImportanceStateCallback
from hf_importance.checks import check_data, check_setup
from hf_importance.objective.loss import Objective
from hf_importance.objective.model import objective_of, overridden
from hf_importance.reporting.cards import extend_card
from hf_importance.reporting.progress import Status, show_status
from hf_importance.run.run import Run
from hf_importance.run.saved import folder_to_resume, save, say_what_is_half_written
from hf_importance.run.start import RunCallback, indexed_loader, start
from hf_importance.samplers.choose import chosen
from hf_importance.samplers.sampler import Sampler
from hf_importance.training_args import ImportanceArguments
from hf_importance.versions import loss_is_scaled, scale_of_one_loss


class ImportanceMixin(Trainer):
    """The importance logic, for any subclass of ``Trainer``: ``class MyTrainer(ImportanceMixin, Seq2SeqTrainer)``.

    Args:
        *args: As ``Trainer`` takes them. ``args`` may be an :class:`ImportanceTrainingArguments` or any
            ``TrainingArguments``, which gets the defaults.
        sampler: What decides which examples are trained on, in place of ``importance_method``.
        compute_score_func: ``compute_score_func(outputs, labels)``, or with a third argument the whole batch, giving
            one non-negative score an example, shape ``(b,)``, in place of ``importance_score``. Where it is not
            proportional to the gradient's norm, the gradient stays unbiased and its variance grows.
        compute_example_losses: ``compute_example_losses(outputs, inputs)`` giving the loss of each example, shape
            ``(b,)``, where it is not the model's own: class weights, sample weights, distillation. ``inputs`` is the
            whole batch. It is what is trained on, in every step. A subclass may define it as a method instead.
        **kwargs: As ``Trainer`` takes them.

    ``sampler`` and ``importance_args``, the fields of :class:`ImportanceArguments`, are attributes too.

    Raises:
        ValueError: It could never switch on at this ``tau_threshold``, both a sampler and a method were given, or a
            value is out of range. What model, loss, loader or batches are is none: then it is off, and one warning.
    """

    def __init__(
        self,
        *args: Any,
        sampler: Sampler | None = None,
        compute_score_func: Callable[[Any, Tensor], Tensor] | None = None,
        compute_example_losses: Callable[[Any, dict[str, Any]], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if compute_example_losses is not None:
            self.compute_example_losses = compute_example_losses
        self.importance_args = self.args if isinstance(self.args, ImportanceArguments) else ImportanceArguments()
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
        self._own_code = overridden(self, ImportanceMixin)
        losses = getattr(self, "compute_example_losses", None)
        self._objective: Objective = objective_of(self, self.importance_args, self._own_code, losses)

    def _begin_run(self) -> None:
        given = self.importance_args, self.compute_score_func, self._folders.get("resumed"), self._own_code
        self._run = start(self, self.sampler, self._objective, *given)
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
        self._objective.count_where_repaired(batches)
        return [without_index(batch)[0] for batch in batches], items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch as ``Trainer`` does, and see that it descends the loss that was computed."""
        with scale_of_one_loss(self):
            if self._run is None:
                return super().training_step(model, inputs, *args, **kwargs)
            if self._run.watch.leaves_out():
                return torch.zeros((), device=self.args.device)
            around = partial(self._importance_loss, type(self).compute_loss.__get__(self))
            with self._run.watch.training_on(inputs, vars(self), around):
                loss = super().training_step(model, inputs, *args, **kwargs)
            self._run.watch.returned(loss)
            return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss as ``Trainer`` does, weighted; in training the outputs are scored, too."""
        return self._importance_loss(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)

    def _importance_loss(
        self, compute: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        objective, run = self._objective, self._run
        objective.hold_batch_norm(model.training)

        def own(model: nn.Module, given: dict[str, Any], wanted: bool) -> Any:
            return compute(model, given, return_outputs=wanted, num_items_in_batch=num_items_in_batch)

        within = run is not None and run.watch.within  # called by the user's, around which ours is
        if run is not None and model.training and not within:
            loss, outputs = run.watch.loss(own, model, inputs, return_outputs, num_items_in_batch)
        elif not within and objective.applies(model.training, inputs):
            loss, outputs = objective.loss_without_run(own, model, inputs, return_outputs, num_items_in_batch)
        else:
            return own(model, inputs, return_outputs)
        if objective.scaled:  # ours is the share of the step already, so training_step must not divide again
            loss_is_scaled(self)
        return (loss, objective.completed(outputs, loss)) if return_outputs else loss

    # ---- Log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with the figures of importance sampling at every training log."""
        if self._run is not None and self.is_in_train:
            if "loss" in logs:
                logs.update(self._run.ledger.log_entries())
            elif "train_runtime" in logs:  # also what train() returns
                logs.update(self._run.ledger.summary())
        super().log(logs, start_time)

    def _status(self) -> Status:
        return Status() if self._run is None else Status(*self._run.ledger.status())

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

        ``baseline``: metrics of a uniform run of the same script, by name (``eval_accuracy``), to compare with.
        """
        super().create_model_card(*args, **kwargs)
        if self.importance_args.importance_sampling and self.is_world_process_zero():
            kind = type(self.accelerator.unwrap_model(self.model)).__name__
            extend_card(self.args.output_dir, self.importance_args, self.state.log_history, baseline, kind)

    # ---- Save and resume ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; for a checkpoint, first bring the state up to date, on all ranks."""
        # Only the Trainer itself calls it on all ranks; a user may well do so on one.
        if self._run is not None and _internal_call and self.is_in_train:
            self._folders["saved"] = output_dir
            self._state_callback.saved = save(self._run, output_dir, self.args.should_save)
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does, and say how it went; a half-written checkpoint is refused by a ``ValueError``."""
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
            if self._run is not None:
                self._run.feed.close()
        if self._run is not None:
            self._run.ledger.say_how_it_went()
        return result


class ImportanceTrainer(ImportanceMixin):
    """``transformers.Trainer`` with importance sampling: swap the two words, change nothing else."""
