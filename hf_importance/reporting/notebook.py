"""Whether importance sampling is on, and what it costs, in the Trainer's bar and table for a notebook."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.notebook import NotebookProgressCallback

from hf_importance.reporting.progress import WithStatus


class StatusNotebookProgressCallback(WithStatus, NotebookProgressCallback):
    """The Trainer's progress bar for a notebook, with on or off behind it, two columns more, and a line a switch."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar with it in its comment; the Trainer's own update of the same step then finds it drawn."""
        status = self._status()
        line = self._switches.line(status)
        if line is not None:
            print(line)
        comment = f"Epoch {state.epoch:.2f}/{state.num_train_epochs}, {status}"
        self.training_tracker.update(state.global_step + 1, comment=comment)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Complete the row that a training log makes where there is no evaluation."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if args.eval_strategy == IntervalStrategy.NO and "loss" in logs:
            self._complete_row()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Complete the row that an evaluation makes."""
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        if self.training_tracker is not None:
            self._complete_row()

    def _complete_row(self) -> None:
        table, status = self.training_tracker.inner_table, self._status()
        # A row with the same first entry is filled up, not added.
        same_row = {table[0][0]: table[-1][0]}
        self.training_tracker.write_line({**same_row, "τ": f"{status.tau:.2f}", "Importance": status.word})
