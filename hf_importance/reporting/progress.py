"""Whether importance sampling is on, and what it costs, in the progress bar.

The bar is the Trainer's own with a few characters more behind it, so ``disable_tqdm`` silences it as it does the
Trainer's. :mod:`hf_importance.reporting.notebook` has its twin for notebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        tau: Moving average of τ.
        cost: What the noise of a uniform step costs by importance, in uniform steps; None where nobody knows.
        instead: What it goes by where it has no cost.
        state: ``"off"``, ``"on"``, or by what method it is on.
        switched: Optimizer steps done when it last went on or off.

    >>> print(Status(1.2, 1.1))
    IS off (would cost 1.10x)
    >>> print(Status(2.3, 0.62, state="on"), Status(2.3, 0.62, state="history"), sep=", ")
    IS on (0.62x), IS on (0.62x, history)
    >>> print(Status(1.3, instead="τ 1.30 < 1.50"))
    IS off (τ 1.30 < 1.50)
    """

    tau: float = 1.0
    cost: float | None = None
    instead: str = ""
    state: str = "off"
    switched: int = 0

    @property
    def why(self) -> str:
        """What it goes by, and the method where there are several; empty where there is nothing to say."""
        if self.cost is None:
            first = self.instead
        else:
            first = f"{'would cost ' if self.state == 'off' else ''}{self.cost:.2f}x"
        return ", ".join(text for text in (first, self.state if self.state not in ("on", "off") else "") if text)

    @property
    def word(self) -> str:
        """On or off, and why."""
        return ("off" if self.state == "off" else "on") + (f" ({self.why})" if self.why else "")

    def __str__(self) -> str:
        """Say it in as few characters as a progress bar has."""
        return f"IS {self.word}"


class Switches:
    """Says in a line of its own that importance sampling went on or off, or draws otherwise."""

    def __init__(self) -> None:
        self._before: str | None = None  # unknown: a run begins

    def line(self, status: Status) -> str | None:
        """Give the line; None where nothing has changed since the last call."""
        before, self._before = self._before, status.state
        if before is None or before == status.state:
            return None
        return f"Importance sampling {status.word} after step {status.switched}, at τ {status.tau:.2f}."


class WithStatus(TrainerCallback):
    """In front of a progress callback of the Trainer's: what stands behind its bar, anew in each run.

    Args:
        status: Says where the run stands.
    """

    def __init__(self, status: Callable[[], Status]) -> None:
        super().__init__()
        self._status = status
        self._switches = Switches()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another run begins."""
        self._switches = Switches()
        super().on_train_begin(args, state, control, **kwargs)


class StatusProgressCallback(WithStatus, ProgressCallback):
    """The Trainer's progress bar for a terminal, with on or off and what it costs behind it, and a line a switch."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put it behind the bar; the bar's own update, which comes next, decides whether it is time to redraw."""
        if self.training_bar is not None:
            status = self._status()
            self.training_bar.set_postfix_str(str(status), refresh=False)
            line = self._switches.line(status)
            if line is not None:
                self.training_bar.write(line)
        super().on_step_end(args, state, control, **kwargs)


def show_status(trainer: Trainer, status: Callable[[], Status]) -> None:
    """Give the Trainer's own progress bar the status; leave any other, and none, as it is.

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
