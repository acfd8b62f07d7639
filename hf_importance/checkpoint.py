"""What a checkpoint holds of importance sampling, and how it gets there: as plain JSON inside ``trainer_state.json``.

The Trainer itself writes the state of every callback that is an ``ExportableState`` into that file, the last one of a
checkpoint, so there is no moment at which a checkpoint is whole without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

VERSION = 1
TENSORS_NAME = "importance_history.safetensors"


class ImportanceStateCallback(TrainerCallback, ExportableState):
    """Carries the state into ``trainer_state.json``; it reacts to no event.

    Args:
        state_dict: Gives the live state, as JSON can hold it. None in the copies that
            ``restore_callback_states_from_checkpoint`` makes; the trainer puts its own back.
    """

    def __init__(self, state_dict: Callable[[], dict[str, Any]] | None = None) -> None:
        self.state_dict = state_dict

    def state(self) -> dict[str, Any]:
        """Give the state in the form that ``TrainerState`` saves."""
        live = {} if self.state_dict is None else {"version": VERSION, **self.state_dict()}
        return {"args": {}, "attributes": {"importance": live}}


def saved_state(state: TrainerState) -> dict[str, Any] | None:
    """Give what the checkpoint behind a resumed ``state`` holds of importance sampling.

    Returns:
        The dict that ``state_dict`` gave when it was saved, or None for the checkpoint of a plain Trainer.

    Raises:
        ValueError: It was written by a newer version of this package.
    """
    exported = state.stateful_callbacks.get(ImportanceStateCallback.__name__, {})
    saved = exported.get("attributes", {}).get("importance")
    if not saved:
        return None
    if saved["version"] > VERSION:
        raise ValueError(
            f"The checkpoint's importance sampling state has version {saved['version']}, and this package knows "
            f"versions up to {VERSION}. Resume with the version of hf_importance that wrote it, or a newer one."
        )
    return {name: value for name, value in saved.items() if name != "version"}


def save_tensors(folder: str | Path, tensors: dict[str, Tensor], step: int) -> None:
    """Write the history method's tensors into a checkpoint that is being made, whole or not at all.

    Args:
        folder: The checkpoint.
        tensors: By name; on the CPU.
        step: Optimizer step of the checkpoint.
    """
    file = Path(folder) / TENSORS_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"step": str(step)})
    os.replace(unfinished, file)


def load_tensors(folder: str | Path | None, step: int) -> dict[str, Tensor]:
    """Read what :func:`save_tensors` wrote.

    Args:
        folder: The checkpoint that is resumed.
        step: The step that it is of.

    Raises:
        ValueError: The file is missing, cut short, or of another step.
    """
    file = Path(folder or "") / TENSORS_NAME
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}
            written = (opened.metadata() or {}).get("step")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}), so the remembered scores of this run are lost. Resume from an older "
            "checkpoint."
        ) from error
    if written != str(step):
        raise ValueError(
            f"{file} was written at step {written}, and the checkpoint is of step {step}: they do not belong "
            "together. Resume from another checkpoint."
        )
    return found
