"""Importance steps by remembered scores: the loader whose batches know their examples, and the steps of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_importance.checkpoint import load_tensors
from hf_importance.checks import cannot_remember
from hf_importance.costs import HYSTERESIS
from hf_importance.redrawing import Redrawing
from hf_importance.remembering import Remembering
from hf_importance.rescoring import RescoringMixin
from hf_importance.training_args import BASELINES, REMEMBERING
from hf_importance.visits import IndexedCollator, IndexedDataset


class RevisitingMixin(RescoringMixin):
    """Draws the micro-batches of an optimizer step by the history method."""

    @property
    def _remembers(self) -> bool:
        """Whether batches know their examples, and scores are remembered."""
        method = self.importance_args.importance_method
        return self._sampling and method in REMEMBERING and not cannot_remember(self.train_dataset, self.args, method)

    @property
    def _revisiting(self) -> bool:
        """Whether the steps are those of a pass, drawn by remembered scores or, where these do not pay, uniformly."""
        return self._remembering is not None and self._remembering.active

    @property
    def _presampling(self) -> bool:
        return self._switch.active and not self._revisiting

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

    def _draws_by_history(self, epoch_iterator: Iterator) -> bool:
        """Give whether this step is drawn by remembered scores. All ranks must call it."""
        if self._remembering is None:
            kind: Callable[..., Remembering] = Remembering
            if self.importance_args.importance_method in BASELINES:
                kind = partial(Redrawing, progress=self._progress, score_all=self._score_all)
            self._remembering = kind(
                self.importance_args,
                self._train_loader,
                self.args.gradient_accumulation_steps,
                self.args.process_index,
                self._ranks,
                self._data_seed,
                self._gather_rows,
            )
            self._remembering.fewest = self._fewest_kept
            if self._resumed_history is not None:
                tensors = load_tensors(self._resumed_folder, self.state.global_step)
                self._remembering.resume(self._resumed_history, tensors, self._resumed_as_saved)
                self._resume_source(self._resumed_history)
        skipped = 0 if self.args.ignore_data_skip else self.state.global_step % self._remembering.updates
        self._remembering.begin_step(epoch_iterator, skipped)
        if self._remembering.at_decision:
            self._settle()
            presampled = self._presampling
            drawn = self._remembering.decide(self._price_otherwise())
            # Behind the last pass of an epoch the steps are uniform until presampling says otherwise.
            if self._switch.turn(drawn or presampled, otherwise=drawn and presampled):
                self._log_switch()
        return self._revisiting

    def _price_otherwise(self) -> float:
        """Give what the next steps cost if they are not drawn by remembered scores, relative to uniform ones."""
        if self.importance_args.importance_method != "auto" or not self._meter.measured:
            return 1.0
        presampled = self._presampling_price() * (HYSTERESIS if self._remembering.drawn else 1)
        return min(presampled, 1.0)

    def _resume_source(self, saved: dict[str, Any]) -> None:
        """Let the switch be on if a pass goes on, or if the steps before were presampled."""
        presampled = self._switch.active and saved["pass"] is None and self.importance_args.importance_method == "auto"
        self._switch.active = self._remembering.drawn or presampled

    def _remembered(self, num_batches: int) -> tuple[list, Tensor]:
        """Give the micro-batches of one optimizer step of a pass."""
        remembering = self._remembering
        self._settle()
        self._mark_step()
        batches = remembering.take(num_batches)
        self._report.step(self._switch.active)
        for index, weights in remembering.handed:
            self._report.weighted_batch(weights, len(index.unique()), remembering.batch_size)
        self._scale_learning_rate(remembering.history.averages.gain if remembering.drawn else 1.0)
        examples = sum(len(weights) for _, weights in remembering.handed)
        # The items that a uniform step of so many examples would have counted.
        self._step_items = examples * self._averaged_ranks * remembering.items_an_example
        self._awaiting = True
        return batches, torch.tensor(self._step_items, device=self.args.device)

    def _progress(self) -> tuple[int, int]:
        return self.state.global_step, self.state.max_steps

    def importance_table(self) -> datasets.Dataset:
        """Give what the history method remembers of each training example, ready to sort and to join.

        Returns:
            A row an example, in the order of ``train_dataset``: ``index``; ``score`` of its last visit, NaN where it
            was never seen; ``age``, optimizer steps since; ``visits``, how often it was trained on; ``weight_sum``,
            the sum of the importance weights that it had, on average as many.

        Raises:
            ValueError: Nothing was remembered: another method, or no training yet.
        """
        if self._remembering is None:
            raise ValueError(
                "importance_table() gives what importance_method='history' has remembered, and nothing was: train "
                f"first, with that method (it is {self.importance_args.importance_method!r})."
            )
        self._settle()
        self._remembering.exchange()
        return self._remembering.table(self.state.global_step)

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate rows over all ranks, of which each may have another number; on the CPU."""
        if self._ranks == 1:
            return rows
        padded = self.accelerator.pad_across_processes(rows.to(self.args.device), dim=0, pad_index=-1)
        gathered = self.accelerator.gather(padded).cpu()
        return gathered[gathered[:, 0] >= 0]
