"""What a checkpoint holds of importance sampling, and how it gets there: as plain JSON inside ``trainer_state.json``.

The Trainer itself writes the state of every callback that is an ``ExportableState`` into that file, the last one of a
checkpoint, so there is no moment at which a checkpoint is whole without it. Which checkpoints are whole is told by
:mod:`hf_importance.whole_checkpoints`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_importance.batches import reserve_sizes
from hf_importance.history import Averages
from hf_importance.reporting import Totals
from hf_importance.sampling import Resampling
from hf_importance.schema import (
    COUNT,
    FLAG,
    Field,
    Nullable,
    Schema,
    check,
    choice,
    integer,
    number,
    optional,
    shortened,
)
from hf_importance.training_args import AUTO, METHODS, SCORES
from hf_importance.variance import SHARES

VERSION = 1
TENSORS_NAME = "importance_history.safetensors"

# The settings that a run may be resumed without, and what is done about each that is another one.
SETTINGS: dict[str, tuple[Schema, str]] = {
    "importance_method": (choice(*METHODS), "scores remembered so far are of no use to another method"),
    "importance_score": (choice(*SCORES), "tau forgets the old scores at the rate of tau_momentum"),
    "presample_ratio": (
        Field("a number from 1 to 1e+06, or 'auto'", lambda value: value == AUTO or number(1, 1e6).accepts(value)),
        "the reserve goes on behind the pools already drawn",
    ),
    "resampling": (choice(*get_args(Resampling)), "it holds from the next step on"),
    "tau_threshold": (optional(number(1, 1e9)), "it holds from the next step on"),
    "tau_momentum": (number(0, 1), "it holds from the next step on"),
    "per_device_train_batch_size": (
        integer(1, 2**31),
        "the reserve goes on behind the pools already drawn, and Trainer skips as many batches as were trained on, "
        "not as many examples",
    ),
    "gradient_accumulation_steps": (integer(1, 2**31), "Trainer skips the batches of as many steps of the new size"),
    "world_size": (integer(1, 2**20), "the ranks draw other examples, and Trainer skips as many batches on each"),
    "seed": (COUNT, "other examples are drawn, and this epoch has another order"),
    "train_dataset length": (
        optional(COUNT),
        "this epoch has another order, so some examples may come twice in it, or not at all",
    ),
}

_SUM = number(0, 1e300)
HISTORY: dict[str, Schema] = {
    "averages": {field.name: _SUM for field in fields(Averages)},
    "passes": COUNT,
    "skipped_share": number(0, 1),
    "pass": Nullable(
        {"batch_size": number(1, 2**31), "length": integer(1), "number": COUNT, "uniform": FLAG, "position": COUNT},
    ),
}

# Every field of the state, all of them required. tau is never below 1 but for rounding, and at most the root of the
# examples of a step.
STATE: dict[str, Schema] = {
    "version": integer(1, VERSION),
    "step": COUNT,
    "switch": {"tau": number(1 - 1e-6, 1e9), "active": FLAG, "switches": COUNT},
    "variance": Field(
        f"a list of {len(SHARES)} numbers from 0 on",
        lambda value: isinstance(value, list) and len(value) == len(SHARES) and all(map(_SUM.accepts, value)),
    ),
    "steps_on": COUNT,
    "totals": {field.name: COUNT for field in fields(Totals)},
    "reserve_position": COUNT,
    "kappa": optional(number(0.001, 0.99)),
    "training_seconds": optional(number(0, 1e6)),
    "overhead": optional(number(0, 0.99)),
    "stream": {"passes": COUNT, "drawn": COUNT},
    "loss_over_step": optional(FLAG),
    "history": Nullable(HISTORY),
    "settings": {name: schema for name, (schema, _) in SETTINGS.items()},
}


class ImportanceStateCallback(TrainerCallback, ExportableState):
    """Carries the state into ``trainer_state.json``; it reacts to no event.

    Args:
        state_dict: Gives the state, as JSON can hold it, or an empty dict where there is none yet. None in the copies
            that ``restore_callback_states_from_checkpoint`` makes; the trainer puts its own back.
    """

    def __init__(self, state_dict: Callable[[], dict[str, Any]] | None = None) -> None:
        self.state_dict = state_dict

    def state(self) -> dict[str, Any]:
        """Give the state in the form that ``TrainerState`` saves."""
        live = {} if self.state_dict is None else self.state_dict()
        return {"args": {}, "attributes": {"importance": {"version": VERSION, **live} if live else {}}}


def saved_state(callbacks: Any, where: str) -> dict[str, Any] | None:
    """Give what a checkpoint holds of importance sampling, checked field by field.

    Args:
        callbacks: The entry ``stateful_callbacks`` of ``trainer_state.json``.
        where: The file, for the error.

    Returns:
        The fields of :data:`STATE`, or None for the checkpoint of a plain Trainer.

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
        wrapped = {"args": {}, "attributes": {"importance": STATE}}
        _check_version(entry)
        check(entry, wrapped, name)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error} This state of importance sampling was not written by this version of hf_importance, or "
            "was damaged. What to do: resume from an older checkpoint, or delete the entry "
            f"stateful_callbacks.{name} from that file to resume with importance sampling starting fresh."
        ) from None
    return entry["attributes"]["importance"]


def _check_version(entry: Any) -> None:
    """Say so where a newer version wrote a state, before its unknown fields are found fault with."""
    for key in ("attributes", "importance"):
        entry = entry.get(key) if isinstance(entry, dict) else None
    version = entry.get("version") if isinstance(entry, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"The state has version {shortened(version)}, and this package knows versions up to {VERSION}; a newer "
            "hf_importance can resume it."
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


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Say which settings a run is resumed with that it was not saved with, and what that does.

    Args:
        saved: The entry ``settings`` of a checked state.
        current: The same of this run.

    Returns:
        A sentence for each, with both values; None where there is none.
    """
    changed = [name for name in SETTINGS if saved[name] != current[name]]
    sentences = [f"{name} was {saved[name]} and is {current[name]}: {SETTINGS[name][1]}." for name in changed]
    return " ".join(sentences) or None


def reserve_batches_per_pool(settings: Mapping[str, Any]) -> int:
    """Give how many batches of the reserve complete one pool, or have distinct examples where pools differ in size."""
    size, ratio = settings["per_device_train_batch_size"], settings["presample_ratio"]
    examples = settings.get("train_dataset length")
    return len(reserve_sizes(size, None if ratio == AUTO else ratio, 4 * size if examples is None else examples))


def resumed_position(position: int, saved: Mapping[str, Any], current: Mapping[str, Any]) -> int:
    """Give where the reserve goes on: behind the pools that were drawn, whatever a pool was then.

    Args:
        position: How many batches of the reserve had been handed out.
        saved: The settings with which they were.
        current: The settings of this run.

    >>> old = {"presample_ratio": 3.0, "per_device_train_batch_size": 16}
    >>> resumed_position(8, old, {**old, "presample_ratio": 5.0})
    16
    """
    before, after = reserve_batches_per_pool(saved), reserve_batches_per_pool(current)
    return position if before == after else -(-position // max(before, 1)) * after
