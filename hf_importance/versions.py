"""What older releases of transformers lack; the lowest that is supported stands in ``pyproject.toml``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer

# From 5.19 on a Trainer can be told that a loss is divided by the number of micro-batches already. Before, it can be
# told that there is one: it reads the number for nothing else, and sets it anew in each step.
CAN_BE_TOLD = hasattr(Trainer, "loss_is_scaled_for_ga")
_NAME, _SCALED = ("loss_is_scaled_for_ga", True) if CAN_BE_TOLD else ("current_gradient_accumulation_steps", 1)


@contextmanager
def scale_of_one_loss(trainer: Trainer) -> Iterator[None]:
    """At its end forget what :func:`loss_is_scaled` said within."""
    before = getattr(trainer, _NAME, None)
    try:
        yield
    finally:
        setattr(trainer, _NAME, before)


def loss_is_scaled(trainer: Trainer) -> None:
    """Tell the Trainer, from ``compute_loss``, that its ``training_step`` must not divide this loss again."""
    setattr(trainer, _NAME, _SCALED)


def says_how_it_is_scaled(kind: type[Trainer]) -> bool:
    """Say whether a subclass of Trainer tells itself how its loss is scaled."""
    return getattr(kind, "loss_is_scaled_for_ga", None) is not None
