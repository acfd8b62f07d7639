"""What is read of the Trainer's model: its loss, how it scores, and what of the hooks is the user's own code."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Trainer

from hf_importance.heads.choose import head_of
from hf_importance.heads.head import Head
from hf_importance.heads.sliced import SlicedHead
from hf_importance.heads.tasks import TokenHead
from hf_importance.heads.user_loss import ExampleLossHead
from hf_importance.objective.fused import FusedLoss
from hf_importance.objective.loss import Objective
from hf_importance.objective.scorer import Scorer
from hf_importance.ranks import ranks_of
from hf_importance.training_args import ImportanceArguments
from hf_importance.versions import says_how_it_is_scaled

Owner = TypeVar("Owner")


def overridden(trainer: Trainer, ours: type) -> tuple[list[str], list[str]]:
    """Give the hooks that the user's code overrides around our class, and below it.

    Args:
        trainer: Its class is looked at.
        ours: The class that stands between.
    """
    hooks = ("compute_loss", "training_step", "_prepare_inputs", "_get_num_items_in_batch")
    order = type(trainer).__mro__
    place = order.index(ours)
    above = [name for name in hooks if any(name in vars(kind) for kind in order[:place])]
    below = order[place + 1 : order.index(Trainer)]
    return above, [name for name in hooks if any(name in vars(kind) for kind in below)]


def can_go_around(trainer: Trainer, above: list[str]) -> bool:
    """Whether a user's ``compute_loss`` is all that computes the loss, and can be asked for the outputs.

    Args:
        trainer: Its class is looked at.
        above: The first part of :func:`overridden`.
    """
    taken = inspect.signature(type(trainer).compute_loss).parameters
    asked = "return_outputs" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())
    alone = "compute_loss" in above and "training_step" not in above and "compute_loss" not in vars(trainer)
    return asked and alone


@contextlib.contextmanager
def standing_in(attributes: dict[str, Any], name: str, value: Any, wanted: bool) -> Iterator[None]:
    """Let an attribute of an instance stand for its class's for a while, where that is wanted."""
    if wanted:
        attributes[name] = value
    try:
        yield
    finally:
        if wanted:
            del attributes[name]


def objective_of(
    trainer: Trainer, settings: ImportanceArguments, own_code: tuple[list[str], list[str]], example_losses: Any
) -> Objective:
    """Find how the loss of the trainer's model splits by example.

    Args:
        trainer: Read here.
        settings: The arguments.
        own_code: See :func:`overridden`.
        example_losses: The user's ``compute_example_losses``, if any.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    smoothing = 0.0 if trainer.label_smoother is None else trainer.label_smoother.epsilon
    ranks = ranks_of(trainer)
    sampling, averaged = settings.importance_sampling, trainer.args.average_tokens_across_devices
    head = _example_head(model, example_losses) or head_of(model, smoothing, trainer.compute_loss_func)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return Objective(
        model,
        head,
        settings.batch_norm,
        shifts_labels=getattr(trainer, "_loss_shifts_labels", False),
        takes_items=trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None,
        ranks=ranks.size,
        # Where nobody asked for importance sampling nothing of ours crosses the network, and each rank counts its own.
        averaged=ranks.averaged if sampling else 1,
        multiplied=ranks.size if averaged else 1,
        # Only where nobody else has a say in how the loss is computed and scaled.
        repairs=not any(name in hooks for hooks in own_code for name in ("compute_loss", "training_step"))
        and not says_how_it_is_scaled(type(trainer))
        and (trainer.compute_loss_func is None or example_losses is not None),
        sharded=sharded,
        fused=FusedLoss(model, head, sharded) if _fused(trainer) else None,
        accumulates=trainer.args.gradient_accumulation_steps > 1,
    )


def _fused(trainer: Trainer) -> bool:
    """Whether the loss is TRL's own, of a fused last layer, with no code of the user's in it."""
    between = [kind for kind in type(trainer).__mro__ if {"compute_loss", "training_step"} & vars(kind).keys()]
    roots = {kind.__module__.partition(".")[0] for kind in between} - {"hf_importance", "transformers"}
    return roots == {"trl"} and trainer.compute_loss_func is None


def _example_head(model: nn.Module, example_losses: Any) -> Head | None:
    if example_losses is None:
        return None
    parameters = inspect.signature(model.forward).parameters.values()
    named = frozenset(one.name for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD)
    return ExampleLossHead(example_losses, named)


def scorer_of(trainer: Trainer, head: Head, settings: ImportanceArguments, score: Any, sharded: bool) -> Scorer:
    """Make what scores pools with a trainer's model; ``sharded``: parameters are whole only inside its forward."""
    this, args = weakref.ref(trainer), trainer.args

    def compile(model: nn.Module) -> Callable[..., Any]:
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
        return torch.compile(model, backend=backend, mode=mode)  # pyrefly: ignore[no-matching-overload]

    # Parameters that are sharded over ranks are whole only inside the model's own forward.
    sliceable = isinstance(head, TokenHead) and not sharded
    return Scorer(
        (lambda: alive(this).model_wrapped) if trainer.is_deepspeed_enabled else (lambda: alive(this).model),
        head,
        score,
        settings.scoring_batch_size,
        None if settings.scoring_dtype == "auto" else settings.scoring_dtype,
        SlicedHead(trainer.accelerator.unwrap_model(trainer.model), head) if sliceable else None,
        compile if args.torch_compile and not sharded else None,
    )


def alive(this: weakref.ref[Owner]) -> Owner:
    """Give what is referred to; it outlives who asks."""
    found = this()
    assert found is not None
    return found
