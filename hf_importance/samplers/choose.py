"""From the arguments to the sampler: the one place that knows the methods by name."""

from __future__ import annotations

import logging
from dataclasses import fields

from hf_importance.samplers.auto import Auto
from hf_importance.samplers.history import History
from hf_importance.samplers.observe import Observe
from hf_importance.samplers.presample import Presample
from hf_importance.samplers.sampler import Sampler
from hf_importance.samplers.two_phase import TwoPhase
from hf_importance.training_args import ImportanceArguments

logger = logging.getLogger(__name__)

# Of each argument, what the sampler's constructor calls it.
NAMES = {
    "importance_budget": "budget",
    "importance_score": "score",
    "presample_ratio": "ratio",
    "tau_threshold": "threshold",
}
# What each method can be told in importance_kwargs and by the arguments above.
SETTINGS: dict[str, tuple[str, ...]] = {
    "presample": tuple(field.name for field in fields(Presample)),
    "history": tuple(field.name for field in fields(History)),
}
_BOTH = tuple(dict.fromkeys([*SETTINGS["presample"], *SETTINGS["history"]]))
SETTINGS["auto"] = SETTINGS["two_phase"] = SETTINGS["observe"] = tuple(name for name in _BOTH if name != "threshold")


def sampler_of(arguments: ImportanceArguments) -> Sampler:
    """Make the sampler that the arguments ask for.

    Raises:
        ValueError: ``importance_kwargs`` holds a name that the method does not know, or a value is out of range.
    """
    method, known = arguments.method, SETTINGS[arguments.method]
    given = {NAMES[name]: value for name, value in arguments.given().items() if value is not None}
    for name, value in arguments.kwargs.items():
        if name not in known:
            raise ValueError(
                f"importance_kwargs has {name!r}, which importance_method={method!r} does not know. It knows "
                f"{', '.join(known)}."
            )
        given[name] = value
    settings = {name: value for name, value in given.items() if name in known}
    if method == "presample":
        return Presample(**settings)
    if method == "history":
        return History(**settings)
    kind = {"auto": Auto, "two_phase": TwoPhase, "observe": Observe}[method]
    default = "constant_variance" if settings.get("ratio") is None else "variance"
    budget = {"budget": settings.pop("budget", default)}
    remembered = {name: value for name, value in settings.items() if name in SETTINGS["history"]}
    fresh = {name: value for name, value in settings.items() if name in SETTINGS["presample"]}
    # Steps that cost what a uniform one costs cannot be had from memory: there it is less noise.
    memory = "variance" if budget["budget"] == "constant_time" else budget["budget"]
    return kind(Presample(**budget, **fresh), History(budget=memory, **remembered))


def chosen(arguments: ImportanceArguments, given: Sampler | None, said: set[str]) -> Sampler:
    """Give the user's own sampler, or the one that the arguments ask for, once all values are checked.

    Args:
        arguments: The arguments.
        given: The user's own.
        said: Warnings that were given already; new ones are added.

    Raises:
        ValueError: A value is unknown or out of range, or both a sampler and a method were given.
    """
    arguments.check()
    if given is not None and arguments.importance_method is not None:
        raise ValueError(
            f"sampler={type(given).__name__}(...) and importance_method={arguments.importance_method!r} were given, "
            "and each says which examples are trained on. Pass one of the two."
        )
    idle = _without_effect(arguments, given) if arguments.importance_sampling else None
    if idle is not None and idle not in said:
        said.add(idle)
        logger.warning(idle)
    return sampler_of(arguments) if given is None else given


def _without_effect(arguments: ImportanceArguments, sampler: Sampler | None) -> str | None:
    """Name the arguments that were given and change nothing, and say why; None where there are none."""
    if sampler is not None:
        kind = type(sampler).__name__
        idle = [name for name, value in arguments.given().items() if value is not None]
        idle += ["importance_kwargs"] if arguments.kwargs else []
        where = f"with sampler={kind}(...), whose constructor takes its settings"
    else:
        known = SETTINGS[arguments.method]
        idle = [n for n, value in arguments.given().items() if value is not None and NAMES[n] not in known]
        where = f"with importance_method={arguments.method!r}"
    return f"{', '.join(idle)}: no effect {where}." if idle else None
