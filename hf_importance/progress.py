"""τ, and whether importance sampling is on, in the progress bar.

The bar is the Trainer's own with a few characters more behind it, so ``disable_tqdm`` silences it as it does the
Trainer's. :mod:`hf_importance.notebook` has its twin for notebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_importance.switching import Switch


def status(switch: Switch) -> str:
    """Say where τ and the switch are, in as few characters as a progress bar has.

    >>> status(Switch(2.0, 0.9))
    'τ 1.00 < 2.00: off'
    """
    sign, state = (">", "on") if switch.active else ("<", "off")
    return f"τ {switch.tau:.2f} {sign} {switch.threshold:.2f}: {state}"


class TauProgressCallback(ProgressCallback):
    """The Trainer's progress bar for a terminal, with τ, its threshold, and on or off behind it.

    Args:
        switch: Gives the live switch.
    """

    def __init__(self, switch: Callable[[], Switch]) -> None:
        super().__init__()
        self._switch = switch

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put τ behind the bar; the bar's own update, which comes next, decides whether it is time to redraw."""
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(status(self._switch()), refresh=False)
        super().on_step_end(args, state, control, **kwargs)


def show_tau(trainer: Trainer, switch: Callable[[], Switch]) -> None:
    """Give the Trainer's own progress bar τ and the switch; leave any other, and none, as it is.

    Args:
        trainer: Its callbacks are looked through.
        switch: Gives the live switch.
    """
    for callback in list(trainer.callback_handler.callbacks):
        kind = type(callback)
        if kind is ProgressCallback:
            twin = TauProgressCallback(switch)
        elif kind.__module__ == "transformers.utils.notebook":
            # It imports IPython, which is sure to be there only now that the Trainer itself found a notebook.
            from hf_importance.notebook import TauNotebookProgressCallback

            twin = TauNotebookProgressCallback(switch)
        else:
            continue
        trainer.remove_callback(callback)
        trainer.add_callback(twin)
