"""Scoring a pool in one forward pass without gradients, and drawing the training batch from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance import scores
from hf_importance.batches import WEIGHTS, Pool, batch_size_of
from hf_importance.heads import Head
from hf_importance.sampling import Resampling, resample
from hf_importance.vocabulary import SlicedHead


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into ``eval()`` inside the block, and those that were training back behind it.

    So scoring has no dropout and neither uses nor moves the batch statistics of BatchNorm, and a submodule that the
    user froze in ``eval()`` stays there.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def score_outputs(
    outputs: Any, inputs: Mapping[str, Any], head: Head, kind: str, function: Callable[[Any, Tensor], Tensor] | None
) -> Tensor:
    """Score each example from what the model returned for it.

    Args:
        outputs: The model's outputs, of a training or a scoring forward pass.
        inputs: The batch, with its labels.
        head: The model's head.
        kind: ``"upper_bound"`` or ``"loss"``. The true gradient norm is not to be had from outputs: for it, too, the
            upper bound is given.
        function: The user's ``compute_score_func(outputs, labels)``, which takes the place of ``kind``.

    Returns:
        Shape ``(b,)``, float32, on the device of the outputs.

    Raises:
        ValueError: The user's function gives no vector with one score an example.
    """
    with torch.no_grad():
        if function is not None:
            result = function(outputs, head.labels(inputs))
            if not isinstance(result, Tensor) or result.shape != (batch_size_of(inputs),):
                raise ValueError(
                    "compute_score_func(outputs, labels) must give a tensor with one score an example, shape "
                    f"({batch_size_of(inputs)},), but it gave {getattr(result, 'shape', type(result).__name__)}."
                )
            result = result.detach().float()
        elif kind == "loss":
            result = head.losses(outputs, inputs)
        else:
            result = head.upper_bound(outputs, inputs)
    return result


def counted(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Multiply what belongs to the examples of a batch, shape ``(b,)``, by the weights that it brings, if any.

    An example that already counts w times has w times the gradient.
    """
    return values * inputs[WEIGHTS] if WEIGHTS in inputs else values


def score_pool(
    model: nn.Module,
    pool: Pool,
    head: Head,
    kind: str,
    function: Callable[[Any, Tensor], Tensor] | None,
    batch_size: int | None,
    sliced: SlicedHead | None = None,
    passes: int = 0,
) -> Tensor:
    """Score all examples of a pool, without dropout, without gradients, and without moving BatchNorm's statistics.

    Args:
        model: The module to score with; its mode is restored.
        pool: The examples, on the model's device.
        head: The model's head.
        kind: ``"upper_bound"``, ``"loss"`` or ``"gradient_norm"``.
        function: The user's score, which takes the place of ``kind``.
        batch_size: Examples in one forward pass; None: the batches as they came.
        sliced: Scores a language model without all its logits, if given.
        passes: Forward passes to make at least. What is missing is made up for with the last batch again: a model
            that is sharded over ranks waits in each pass for all of them.

    Returns:
        Shape ``(B,)``, float32, in the order of the pool, on the model's device.
    """
    with evaluation_mode(model):
        if kind == "gradient_norm" and function is None:
            return _gradient_norms(model, pool, head)
        with torch.no_grad():
            found = []
            for batch in pool.chunks(batch_size):
                result = None
                if sliced is not None and function is None and sliced.applies(batch):
                    result = sliced.scores(model, batch, kind)
                if result is None:
                    result = score_outputs(model(**head.model_inputs(batch)), batch, head, kind, function)
                found.append(counted(result, batch))
            for _ in range(passes - len(found)):
                model(**head.model_inputs(batch))
            return torch.cat(found)


@dataclass
class Draw:
    """One training batch drawn from a pool, and what it stands for.

    Attributes:
        batch: The rows that are trained on, with their entry ``importance_weights``; on the device.
        weights: The same weights; on the CPU.
        distinct: How many of its rows are distinct.
    """

    batch: dict[str, Any]
    weights: Tensor
    distinct: int


def draw(pool: Pool, pool_scores: Tensor, method: Resampling, generator: torch.Generator) -> Draw:
    """Draw as many examples from a scored pool as the Trainer's own batch, its first, has.

    Args:
        pool: The examples.
        pool_scores: Score of each, non-negative; on the CPU, shape ``(B,)``.
        method: ``"systematic"`` or ``"multinomial"``.
        generator: Source of randomness, on the CPU.
    """
    size = pool.sizes[0]
    index, weights = resample(pool_scores, size, method, generator)
    batch, order = pool.take(index)
    weights = weights[order].float()
    return Draw(_weighted(batch, weights), weights, len(index.unique()))


def keep_own(pool: Pool) -> Draw:
    """Keep the Trainer's own batch of a pool, each example with weight 1."""
    weights = torch.ones(pool.sizes[0])
    return Draw(_weighted(pool.batches[0], weights), weights, pool.sizes[0])


def _weighted(batch: Mapping[str, Any], weights: Tensor) -> dict[str, Any]:
    device = next(value.device for value in batch.values() if isinstance(value, Tensor))
    on_device = weights.to(device, non_blocking=True)
    given = batch.get(WEIGHTS)
    return {**batch, WEIGHTS: on_device if given is None else given * on_device}


def _gradient_norms(model: nn.Module, pool: Pool, head: Head) -> Tensor:
    def losses() -> Iterator[Tensor]:
        for batch in pool.chunks(1):
            yield counted(head.losses(model(**head.model_inputs(batch)), batch), batch).sum()

    with torch.enable_grad():
        return scores.gradient_norm(losses(), (p for p in model.parameters() if p.requires_grad))
