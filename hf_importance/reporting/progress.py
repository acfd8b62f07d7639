"""τ, and whether importance sampling is on, in the progress bar.

The bar is the Trainer's own with a few characters more behind it, so ``disable_tqdm`` silences it as it does the
Trainer's. :mod:`hf_importance.reporting.notebook` has its twin for notebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        tau: Moving average of τ.
        against: What it, or what is measured beside it, is compared with.
        state: ``"off"``, ``"on"``, or by what method it is on.

    >>> print(Status(1.0, "< 2.00", "off"))
    τ 1.00 < 2.00: off
    """

    tau: float
    against: str
    state: str

    def __str__(self) -> str:
        """Say it in as few characters as a progress bar has."""
        return f"τ {self.tau:.2f} {self.against}: {self.state}"


class StatusProgressCallback(ProgressCallback):
    """The Trainer's progress bar for a terminal, with τ, what it is compared with, and on or off behind it.

    Args:
        status: Says where the run stands.
    """

    def __init__(self, status: Callable[[], Status]) -> None:
        super().__init__()
        self._status = status

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put τ behind the bar; the bar's own update, which comes next, decides whether it is time to redraw."""
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(str(self._status()), refresh=False)
        super().on_step_end(args, state, control, **kwargs)


def show_status(trainer: Trainer, status: Callable[[], Status]) -> None:
    """Give the Trainer's own progress bar τ and the switch; leave any other, and none, as it is.

    Args:
        trainer: Its callbacks are looked through.
        status: Says where the run stands.
    """
    for callback in list(trainer.callback_handler.callbacks):
        kind = type(callback)
        if kind is ProgressCallback:
            twin = StatusProgressCallback(status)
        elif kind.__module__ == "transformers.utils.notebook":
            # It imports IPython, which is sure to be there only now that the Trainer itself found a notebook.
            from hf_importance.reporting.notebook import StatusNotebookProgressCallback

            twin = StatusNotebookProgressCallback(status)
        else:
            continue
        trainer.remove_callback(callback)
        trainer.add_callback(twin)
