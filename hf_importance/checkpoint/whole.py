"""Which checkpoints are whole. A run that is killed while it saves leaves a folder that must not be resumed from.

``trainer_state.json`` is the last file that rank 0 writes, and is taken away before the first is written, so a folder
without it is half-written. Other ranks write only their random state, which is looked at too.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_importance.checkpoint.schema import Schema, shortened
from hf_importance.checkpoint.state import TENSORS_NAME, saved_state

STATE_FILE = "trainer_state.json"
# What transformers' enable_jit_checkpoint puts into a folder while it saves.
SENTINEL = "checkpoint-is-incomplete.txt"


class HalfWritten(ValueError):
    """A checkpoint that was not written to its end; the message names the folder and what is wrong with it."""


def read_state(folder: Path) -> dict[str, Any]:
    """Read the ``trainer_state.json`` of a checkpoint.

    Raises:
        HalfWritten: It is missing, empty, or cut off.
        ValueError: It holds JSON that no Trainer wrote.
    """
    file = folder / STATE_FILE
    try:
        text = file.read_bytes().decode("utf-8")
        state = json.loads(text)
    except FileNotFoundError:
        raise HalfWritten(
            f"{folder} has no {STATE_FILE}, the last file of a checkpoint: it is half-written."
        ) from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deep to be the state of a Trainer.") from None
    except ValueError as error:  # no JSON, no UTF-8, or an integer of more than 4300 digits
        size = file.stat().st_size
        raise HalfWritten(f"{file} ({size} bytes) is empty, cut off or damaged: {error}.") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold an object, but it holds {shortened(state)}.")
    return state


def check_whole(folder: Path, schema: Schema) -> None:
    """Check that every file of a checkpoint is there to its end, without loading any, and that the state is sound.

    Args:
        folder: The checkpoint.
        schema: What the state of importance sampling must be.

    Raises:
        HalfWritten: One is missing, or is cut off.
        ValueError: The state of importance sampling is none that this version can take up.
    """
    state = read_state(folder)
    saved = saved_state(state.get("stateful_callbacks", {}), str(folder / STATE_FILE), schema)
    if saved is not None and saved["table"] is not None and not (folder / TENSORS_NAME).exists():
        raise HalfWritten(f"{folder} has no {TENSORS_NAME}, the scores that the run remembers: it is half-written.")
    if (folder / SENTINEL).exists():
        raise HalfWritten(f"{folder} holds {SENTINEL}: it is half-written.")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):  # compares the length of the file with what its header promises
                pass
        except (SafetensorError, OSError) as error:
            raise HalfWritten(f"{file} is cut off or damaged: {error}.") from None
    random_states = sorted(folder.glob("rng_state_*.pth"))
    for file in [*folder.glob("rng_state.pth"), *random_states, folder / "optimizer.pt", folder / "scheduler.pt"]:
        if file.exists() and not zipfile.is_zipfile(file):  # its table of contents stands at its end
            raise HalfWritten(f"{file} is cut off or damaged.")
    ranks = 1 if saved is None else saved["settings"]["world_size"]
    if random_states and len(random_states) < ranks:
        raise HalfWritten(
            f"{folder} has the random state of {len(random_states)} of {ranks} ranks: it is half-written. (Where each "
            "machine keeps its own folder, set save_on_each_node=False and share one.)"
        )


def newest_whole(output_dir: Path, schema: Schema) -> tuple[Path | None, list[HalfWritten]]:
    """Find the newest checkpoint that is whole, by its step.

    Returns:
        Its folder, None where there is none; and what is wrong with the newer ones that were passed over.

    Raises:
        ValueError: The newest whole one holds a state of importance sampling that cannot be taken up.
    """
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    found = sorted(((int(match[1]), path) for match, path in numbered if match and path.is_dir()), reverse=True)
    passed_over: list[HalfWritten] = []
    for _, folder in found:
        try:
            check_whole(folder, schema)
        except HalfWritten as error:
            passed_over.append(error)
        else:
            return folder, passed_over
    return None, passed_over


def checkpoint_to_resume(wanted: str | bool, output_dir: str, schema: Schema) -> tuple[str | bool, list[HalfWritten]]:
    """Give the checkpoint that a run resumes from, and what is wrong with those that were passed over for it.

    Args:
        wanted: ``resume_from_checkpoint`` as the user gave it: a folder, or True for the newest.
        output_dir: Where True looks.
        schema: As for :func:`check_whole`.

    Returns:
        The folder; ``wanted`` itself where there is nothing to look at, so that the Trainer says so.

    Raises:
        ValueError: The folder that the user named, or every one there is, is half-written, or its state cannot be
            taken up.
    """
    if wanted is not True:
        folder = Path(str(wanted))
        if folder.is_dir():
            try:
                check_whole(folder, schema)
            except HalfWritten as error:
                raise HalfWritten(
                    f"{error} Resume from an older checkpoint; resume_from_checkpoint=True takes the newest whole one."
                ) from None
        return wanted, []
    if not Path(output_dir).is_dir():
        return wanted, []
    newest, passed_over = newest_whole(Path(output_dir), schema)
    if newest is None and passed_over:
        raise HalfWritten(
            f"{output_dir} has no whole checkpoint to resume from. {' '.join(map(str, passed_over))} Delete them and "
            "train without resume_from_checkpoint."
        )
    return (wanted if newest is None else str(newest)), passed_over
