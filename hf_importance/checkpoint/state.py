"""What a checkpoint holds of importance sampling, and how it gets there: as plain JSON inside ``trainer_state.json``.

The Trainer itself writes the state of every callback that is an ``ExportableState`` into that file, the last one of a
checkpoint, so there is no moment at which a checkpoint is whole without it. What the state consists of, its owners
say; which checkpoints are whole is told by :mod:`hf_importance.checkpoint.whole`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_importance.checkpoint.schema import Schema, check, shortened

VERSION = 4
TENSORS_NAME = "importance_history.safetensors"


class ImportanceStateCallback(TrainerCallback, ExportableState):
    """Carries the state into ``trainer_state.json``; it reacts to no event.

    Attributes:
        saved: The state, as JSON can hold it; empty where there is none yet, and in the copies that
            ``restore_callback_states_from_checkpoint`` makes: the trainer puts its own back.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Give the state in the form that ``TrainerState`` saves."""
        return {"args": {}, "attributes": {"importance": self.saved}}


def saved_state(callbacks: Any, where: str, schema: Schema) -> dict[str, Any] | None:
    """Give what a checkpoint holds of importance sampling, checked field by field.

    Args:
        callbacks: The entry ``stateful_callbacks`` of ``trainer_state.json``.
        where: The file, for the error.
        schema: What the state must be, beside its version.

    Returns:
        The state, or None for the checkpoint of a plain Trainer.

    Raises:
        ValueError: It is not what this version writes. The message names the file, the field, its value, and what to
            do.
    """
    name = ImportanceStateCallback.__name__
    if not isinstance(callbacks, Mapping):
        raise ValueError(f"{where}: stateful_callbacks must be an object, but it is {shortened(callbacks)}.")
    entry = callbacks.get(name)
    if entry is None or entry == {} or entry == {"args": {}, "attributes": {"importance": {}}}:
        return None
    try:
        _check_version(entry)
        wrapped = {"args": {}, "attributes": {"importance": schema}}
        check(entry, wrapped, name)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error} This state of importance sampling was not written by this version of hf_importance, or "
            "was damaged. What to do: resume from an older checkpoint, or delete the entry "
            f"stateful_callbacks.{name} from that file to resume with importance sampling starting fresh."
        ) from None
    return entry["attributes"]["importance"]


def _check_version(entry: Any) -> None:
    """Say so where another version wrote a state, before its unknown fields are found fault with."""
    for key in ("attributes", "importance"):
        entry = entry.get(key) if isinstance(entry, dict) else None
    version = entry.get("version") if isinstance(entry, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"The state has version {shortened(version)}, and this package knows versions up to {VERSION}; a newer "
            "hf_importance can resume it."
        )
    if type(version) is int and 1 <= version < VERSION:
        raise ValueError(
            f"The state has version {version}, that of an earlier hf_importance, and this one reads version {VERSION} "
            "only."
        )


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
