"""Scoring a pool in one forward pass without gradients, and drawing the training batch from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_importance import scores
from hf_importance.batches import WEIGHTS, Pool, batch_size_of
from hf_importance.heads import Head
from hf_importance.sampling import Resampling, bias_weights, resample
from hf_importance.vocabulary import SlicedHead


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into ``eval()`` inside the block, and those that were training back behind it.

    So scoring has no dropout and neither uses nor moves the batch statistics of BatchNorm, and a submodule that the
    user froze in ``eval()`` stays there.
    """
    training = [module for module in model.modules() if module.training]
    _set_mode(training, False)
    try:
        yield
    finally:
        _set_mode(training, True)


def _set_mode(modules: list[nn.Module], training: bool) -> None:
    for module in modules:
        # nn.Module's own way looks for a parameter, a buffer and a module of that name first: 0.8 ms a pool for the
        # 214 modules of MobileNetV2. A scripted module has another way.
        own = type(module).__setattr__ is nn.Module.__setattr__
        (object if own else type(module)).__setattr__(module, "training", training)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@contextlib.contextmanager
def autocast_to(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Let the model compute in ``dtype`` inside the block, whatever precision it trains in.

    Whatever the precision of the scores, the probabilities that they give are known exactly and undone by the
    weights: lower precision moves which examples are drawn, never what the gradient is an estimate of.

    Args:
        model: The module that is called.
        dtype: ``"bf16"``, ``"fp16"``, ``"fp32"``, or None: as in training.
    """
    if dtype is None:
        yield
        return
    # Under mixed precision accelerate has wrapped `forward` in an autocast of its own, which would win.
    wrapping = ("forward", "_original_forward")
    wrapped = {name: vars(model)[name] for name in wrapping if name in vars(model)}
    if "_original_forward" in wrapped:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, DTYPES[dtype], enabled=dtype != "fp32"):
            yield
    finally:
        vars(model).update(wrapped)


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
    dtype: str | None = None,
    compiled: Callable[..., Any] | None = None,
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
        dtype: Precision of the forward pass; see :func:`autocast_to`.
        compiled: The same model, compiled, if it is to score; where slices are worth it the model itself does.
        passes: Forward passes to make at least. What is missing is made up for with the last batch again: a model
            that is sharded over ranks waits in each pass for all of them.

    Returns:
        Shape ``(B,)``, float32, in the order of the pool, on the model's device.
    """
    forward = model if compiled is None else compiled
    with evaluation_mode(model), autocast_to(model, dtype):
        if kind == "gradient_norm" and function is None:
            return _gradient_norms(model, pool, head)
        with torch.no_grad():
            found = []
            for batch in pool.chunks(batch_size):
                result = None
                if sliced is not None and function is None and sliced.applies(batch):
                    result = sliced.scores(model, batch, kind)
                if result is None:
                    result = score_outputs(forward(**head.model_inputs(batch)), batch, head, kind, function)
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
        rows: Which rows of the pool they are; on the CPU.
    """

    batch: dict[str, Any]
    weights: Tensor
    rows: Tensor

    @property
    def distinct(self) -> int:
        """How many of its rows are distinct."""
        return len(self.rows.unique())


def draw(
    pool: Pool,
    pool_scores: Tensor,
    method: Resampling,
    generator: torch.Generator,
    kept: int,
    share: float,
    exponent: float = 1.0,
) -> Draw:
    """Draw examples from a scored pool.

    Args:
        pool: The examples.
        pool_scores: Score of each, non-negative; on the CPU, shape ``(B,)``.
        method: ``"systematic"`` or ``"multinomial"``.
        generator: Source of randomness, on the CPU.
        kept: How many to draw, ``n``.
        share: As for :func:`stand_for`.
        exponent: As for :func:`bias_weights`; 1 leaves the gradient unbiased.
    """
    index, weights = resample(pool_scores, kept, method, generator)
    return stand_for(pool, index, bias_weights(weights, exponent), share)


def stand_for(pool: Pool, index: Tensor, weights: Tensor, share: float) -> Draw:
    """Make the batch of drawn examples that stands for the Trainer's own batch, the first of the pool.

    Args:
        pool: The examples.
        index: Which of them were drawn, shape ``(n,)``.
        weights: Their importance weights, which leave the mean over them unbiased, shape ``(n,)``.
        share: Share of a batch that the optimizer step keeps, the same for all its batches and ranks, by which its
            item count is multiplied too. Rounding makes of it ``n / b``, which differs where batches differ in size;
            the loss weighs each batch by ``b`` all the same, as the uniform step does.
    """
    own = pool.sizes[0]
    batch, order = pool.take(index)
    weights = weights[order].float()
    given = _weighted(batch, weights * (share * own / len(index)))
    return Draw(given, weights, index[order])


def keep_own(pool: Pool, share: float) -> Draw:
    """Keep the Trainer's own batch of a pool, each example with weight 1; arguments as for :func:`draw`."""
    weights = torch.ones(pool.sizes[0])
    return Draw(_weighted(pool.batches[0], weights * share), weights, torch.arange(pool.sizes[0]))


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
