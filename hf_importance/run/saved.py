"""What a run saves, made of what its parts say of themselves, and how it takes it up again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_importance.checkpoint.schema import (
    COUNT,
    FLAG,
    Field,
    Nullable,
    Schema,
    check,
    from_state,
    integer,
    optional,
    schema_of,
)
from hf_importance.checkpoint.state import VERSION, save_tensors
from hf_importance.checkpoint.whole import STATE_FILE, HalfWritten, check_whole, checkpoint_to_resume
from hf_importance.heads.class_weights import WeightState
from hf_importance.reporting.report import Totals
from hf_importance.run.clock import ClockState
from hf_importance.run.feed import FeedState
from hf_importance.run.ledger import RunState
from hf_importance.run.run import Run
from hf_importance.run.table import TableState
from hf_importance.samplers.sampler import Sampler

logger = logging.getLogger(__name__)

# The settings of a run that may be resumed without, and what is done about each that is another one.
SETTINGS: dict[str, tuple[Schema, str]] = {
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
# Those of the sampler, by their names; any other holds from the next step on.
OF_THE_SAMPLER = {
    "name": "it begins anew, off",
    "score": "tau forgets the old scores at the rate of its momentum, and the table is given up",
    "ratio": "the reserve goes on behind the pools already drawn",
}
_TEXTS = Field(
    "an object of texts",
    lambda value: isinstance(value, dict) and "name" in value and all(isinstance(v, str) for v in value.values()),
)
_ANYTHING = Field("an object", lambda value: isinstance(value, dict))


def schema(sampler: Sampler) -> Schema:
    """Give what the state in a checkpoint must be: every field required, and no other.

    Args:
        sampler: The one of this run; the state of another is looked at no further.
    """

    def owned(value: Any) -> bool:
        # Whose state it is stands in it, so that this can be told before anything is taken from it.
        if not (
            isinstance(value, dict) and value.keys() == {"settings", "state"} and _TEXTS.accepts(value["settings"])
        ):
            return False
        if value["settings"]["name"] != type(sampler).__name__:
            return _ANYTHING.accepts(value["state"])
        check(value["state"], schema_of(sampler.State), f"the state of {type(sampler).__name__}")
        return True

    return {
        "version": integer(VERSION, VERSION),
        "step": COUNT,
        "run": schema_of(RunState),
        "totals": schema_of(Totals),
        "feed": schema_of(FeedState),
        "clock": schema_of(ClockState),
        "table": Nullable(schema_of(TableState)),
        "loss_over_step": optional(FLAG),
        "class_weights": schema_of(WeightState),
        "sampler": Field("an object with settings and state", owned),
        "settings": {name: field for name, (field, _) in SETTINGS.items()},
    }


def settings_of(run: Run) -> dict[str, Any]:
    """Give what a run can be resumed with another value of, by the names in :data:`SETTINGS`."""
    facts = run.facts
    return {
        "per_device_train_batch_size": facts.batch_size,
        "gradient_accumulation_steps": facts.accumulation,
        "world_size": facts.ranks,
        "seed": facts.seed,
        "train_dataset length": facts.examples,
    }


def _settings_of_sampler(sampler: Sampler) -> dict[str, str]:
    found = {"name": type(sampler).__name__}
    for field in fields(sampler) if is_dataclass(sampler) else ():
        value = getattr(sampler, field.name)
        if isinstance(value, Sampler):
            inner = _settings_of_sampler(value)
            found |= {f"{field.name}.{name}": text for name, text in inner.items() if name != "name"}
        elif isinstance(value, int | float | str | None):
            found[field.name] = repr(value)
    return found


def state_of(run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give the state as JSON can hold it, and the tensors. All ranks must call it; it changes nothing but counts.

    In the middle of a step it is the state of the step's beginning.
    """
    run.commit()
    run.report.sync()
    compared = run.ledger.compared()
    sampler, table, scale, weights = run.sampler, run.table, run.objective.scale, run.objective.weights.state
    state = {
        "version": VERSION,
        "step": run.facts.step(),
        "run": {**asdict(run.state), "compared": run.ranks.sum(compared) if compared else []},
        "totals": asdict(run.report.totals),
        "feed": asdict(run.feed.state),
        "clock": asdict(run.clock.state),
        "table": None if table is None else asdict(table.state),
        "loss_over_step": None if scale is None else scale.over_step,
        "class_weights": asdict(replace(weights, recent=run.ranks.sum(weights.recent) if weights.recent else [])),
        "sampler": {"settings": _settings_of_sampler(sampler), "state": sampler.state_dict()},
        "settings": settings_of(run),
    }
    return state, ({} if table is None else {**table.tensors(), **run.feed.tensors()})


def save(run: Run, folder: str | None, should_save: bool) -> dict[str, Any]:
    """Begin a checkpoint. All ranks must call it.

    Args:
        run: What is saved.
        folder: The checkpoint; what makes it look whole is taken away first, if it is written over:
            ``trainer_state.json`` and each rank's random state, which the Trainer writes last.
        should_save: Whether this rank writes what ranks share.

    Returns:
        The state, for ``trainer_state.json``.
    """
    if folder is not None:
        if should_save:
            Path(folder, STATE_FILE).unlink(missing_ok=True)
        Path(folder, f"rng_state_{run.ranks.rank}.pth").unlink(missing_ok=True)
    state, tensors = state_of(run)
    if tensors and folder is not None and should_save:
        save_tensors(folder, tensors, run.facts.step())
    return state


def folder_to_resume(wanted: str | bool, output_dir: str, sampler: Sampler) -> str | bool:
    """Give the checkpoint to resume from: the one that is wanted, or with True the newest whole one.

    Raises:
        ValueError: It is half-written, or its state of importance sampling cannot be taken up.
    """
    folder, passed_over = checkpoint_to_resume(wanted, output_dir, schema(sampler))
    if passed_over:
        logger.warning("Resuming from %s, not from what is newer. %s", folder, " ".join(map(str, passed_over)))
    return folder


def say_what_is_half_written(folder: str | None, should_save: bool, sampler: Sampler) -> None:
    """Training failed, perhaps on a full disk: say which checkpoint that leaves behind half-written."""
    if folder is None or not should_save:
        return
    try:
        check_whole(Path(folder), schema(sampler))
    except HalfWritten as error:
        logger.error(
            "%s Older checkpoints are as they were: resume_from_checkpoint=True takes the newest whole one.", error
        )


def resume(run: Run, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Take up what :func:`state_of` gave, checked already; warn where settings are others.

    Args:
        run: A new one.
        saved: The state.
        tensors: The tensors; empty where there is no table.
        where: The file of the tensors, for errors.

    Raises:
        ValueError: The table is of a dataset of another length, or is damaged.
    """
    current = settings_of(run)
    changed = [
        f"{name} was {saved['settings'][name]} and is {current[name]}: {meaning}."
        for name, (_, meaning) in SETTINGS.items()
        if saved["settings"][name] != current[name]
    ]
    before, now = saved["sampler"]["settings"], _settings_of_sampler(run.sampler)
    same = before["name"] == now["name"]
    for name in now if same else ["name"]:
        if before.get(name) != now[name]:
            meaning = OF_THE_SAMPLER.get(name.split(".")[-1], "it holds from the next step on")
            called = "sampler" if name == "name" else name
            changed.append(f"{called} was {before.get(name)} and is {now[name]}: {meaning}.")
    if changed and run.ranks.rank == 0:
        logger.warning(
            "Resuming from step %d with other settings than it was saved with, so not to the last bit. %s",
            saved["step"],
            " ".join(changed),
        )
    run.ledger.state = from_state(RunState, saved["run"], "run")
    if run.ranks.rank == 0 and len(run.state.compared) == len(run.ledger.compared()):  # it is one list now
        run.ledger.compared = run.state.compared.copy
    run.pools.precision.choose(run.state.scoring_dtype)
    run.report.totals = Totals(**saved["totals"])
    if run.objective.scale is not None:
        run.objective.scale.over_step = saved["loss_over_step"]
    run.objective.take_up(from_state(WeightState, saved["class_weights"], "class_weights"), run.ranks.rank)
    run.clock.state = from_state(ClockState, saved["clock"], "clock")
    scored_alike = _score(before) == _score(now)
    remembered = run.table is not None and saved["table"] is not None and scored_alike
    if run.table is not None and remembered and "scores" in tensors:
        _check_length(len(tensors["scores"]), len(run.table.scores))
    feed, as_saved = from_state(FeedState, saved["feed"], "feed"), not changed and remembered
    run.feed.load(feed, dict(tensors), as_saved, where)
    if run.table is not None and remembered:
        run.table.load(TableState(**saved["table"]), dict(tensors), where)
    if same:
        run.sampler.load_state_dict(saved["sampler"]["state"])


def _score(settings: Mapping[str, str]) -> str | None:
    return next((text for name, text in settings.items() if name.split(".")[-1] == "score"), settings["name"])


def _check_length(saved: int, current: int) -> None:
    if saved != current:
        raise ValueError(
            f"The checkpoint remembers scores of {saved} examples, and train_dataset has {current}: they would be "
            "credited to the wrong ones. Resume with the dataset that the run began with, or with "
            "importance_method='presample'."
        )
