"""Scores: of a pool in a forward pass without gradients, and of the outputs that a training pass had anyway."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_importance.batches.entries import WEIGHTS, batch_size_of
from hf_importance.batches.lengths import passes_by_length
from hf_importance.batches.pool import PooledBatches
from hf_importance.batches.reserve import split_evenly
from hf_importance.heads import scores
from hf_importance.heads.head import Head
from hf_importance.heads.sliced import SlicedHead
from hf_importance.transfer import to_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Score = str | Callable[[Any, Tensor], Tensor]


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


def score_outputs(outputs: Any, inputs: Mapping[str, Any], head: Head, score: Score) -> Tensor:
    """Score each example from what the model returned for it.

    Args:
        outputs: The model's outputs, of a training or a scoring forward pass.
        inputs: The batch, with its labels.
        head: The model's head.
        score: ``"upper_bound"``, ``"loss"``, or a function ``(outputs, labels)`` or ``(outputs, labels, inputs)``. The
            true gradient norm is not to be had from outputs: for it, too, the upper bound is given.

    Returns:
        Shape ``(b,)``, float32, on the device of the outputs, each multiplied by the weight that the batch brings for
        its example, if any: an example that already counts w times has w times the gradient.

    Raises:
        ValueError: The user's function gives no vector with one score an example.
    """
    with torch.no_grad():
        if callable(score):
            result = score(*(outputs, head.labels(inputs), inputs)[: _arguments(score)])
            if not isinstance(result, Tensor) or result.shape != (batch_size_of(inputs),):
                raise ValueError(
                    "compute_score_func must give a tensor with one score an example, shape "
                    f"({batch_size_of(inputs)},), but it gave {getattr(result, 'shape', type(result).__name__)}."
                )
            result = result.detach().float()
        elif score == "loss":
            result = head.losses(outputs, inputs)
        else:
            result = head.upper_bound(outputs, inputs)
    return _counted(result, inputs)


@functools.lru_cache
def _arguments(score: Callable[..., Tensor]) -> int:
    """Say whether a user's score is called with outputs and labels, or with the batch too."""
    try:
        taken = inspect.signature(score).parameters.values()
    except (TypeError, ValueError):  # something built in
        return 2
    places = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return 3 if len(places) > 2 else 2


def _counted(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    return values * inputs[WEIGHTS] if WEIGHTS in inputs else values


@dataclass
class Scorer:
    """Scores pools with one model.

    Attributes:
        model: Gives the module to score with: DeepSpeed's engine, so that ZeRO-3 gathers the parameters; FSDP's
            module is the model itself. DDP's wrapper would only synchronise buffers once more.
        head: The model's head.
        score: As for :func:`score_outputs`, or ``"gradient_norm"``, the true norm.
        batch_size: Examples in one forward pass, at most, as the user asked; None: see :meth:`largest_pass`.
        dtype: Precision of the forward pass; see :func:`autocast_to`.
        sliced: Scores a language model without all its logits, where given.
        compile: Compiles a model, where it is to be compiled; where slices are worth it the model itself scores.
    """

    model: Callable[[], nn.Module]
    head: Head
    score: Score = "upper_bound"
    batch_size: int | None = None
    dtype: str | None = None
    sliced: SlicedHead | None = None
    compile: Callable[[nn.Module], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        """Nothing is compiled yet."""
        self._compiled: tuple[nn.Module, Callable[..., Any]] | None = None

    def check(self, scores: Tensor) -> None:
        """Refuse what cannot be scores.

        Args:
            scores: On the CPU.

        Raises:
            ValueError: The user's function gave a negative one.
        """
        if callable(self.score) and bool((scores < 0).any()):
            raise ValueError(
                f"compute_score_func gave a score of {float(scores.min()):.4g}: a score is how often an example is "
                "drawn over others, so it cannot be negative. Give its absolute value, or its square."
            )

    def largest_pass(self, in_lengths: bool, batch_size: int, varies: bool) -> int | None:
        """Give the examples that a forward pass takes at most; None: those of one batch as it came.

        Args:
            in_lengths: Whether the examples are texts or the like.
            batch_size: Of training.
            varies: Whether the reserve comes in quarters of a batch. A pass of its own for one or two of them is dear:
                MobileNetV2 takes 0.24 of a training step for 32 and 4 pictures, 0.20 for 36 (CPU, bf16). Without
                gradients no activations are kept, so two batches need less memory than training on one. Texts would
                be padded to the longest of all.
        """
        if self.batch_size is not None or not varies:
            return self.batch_size
        return batch_size * (1 if in_lengths else 2)

    def passes(self, examples: int, count: int, pool: PooledBatches, batch_size: int, varies: bool) -> int:
        """Forward passes that scoring ``count`` pools of so many examples each takes."""
        batches = count * -(-examples // batch_size)
        return math.ceil(batch_size * batches / (self.largest_pass(pool.in_lengths, batch_size, varies) or batch_size))

    def __call__(self, pool: PooledBatches, size: int | None = None, passes: int = 0) -> Tensor:
        """Score all examples of a pool, without dropout, without gradients, without moving BatchNorm's statistics.

        Args:
            pool: The examples, on the model's device.
            size: Examples in one forward pass, see :meth:`largest_pass`; split evenly where they are no texts.
            passes: Forward passes to make at least. What is missing is made up for with the last batch again: a model
                that is sharded over ranks waits in each pass for all of them.

        Returns:
            Shape ``(B,)``, float32, in the order of the pool, on the model's device.
        """
        if size is not None and not pool.in_lengths:
            size = split_evenly(len(pool), size)[0]
        model, head = self.model(), self.head
        with evaluation_mode(model), autocast_to(model, self.dtype):
            if self.score == "gradient_norm":
                return _gradient_norms(model, pool, head)
            forward = self._forward(model)
            # Not inference_mode, which saves a MobileNetV2 1 % of its pass and a BERT nothing (docs/benchmarks.md):
            # what a model makes once and keeps, such as a table of positions, could be part of no training pass then.
            with torch.no_grad():
                found, rows = [], passes_by_length(pool, size)
                for batch in pool.chunks(size) if rows is None else map(pool.texts, rows):
                    result = self._by_slices(model, batch)
                    if result is None:
                        result = score_outputs(forward(**head.model_inputs(batch)), batch, head, self.score)
                    found.append(result)
                for _ in range(passes - len(found)):
                    model(**head.model_inputs(batch))
                scores = torch.cat(found)
                if rows is None:
                    return scores
                return torch.empty_like(scores).index_copy_(0, to_device(torch.cat(rows), scores.device), scores)

    def _by_slices(self, model: nn.Module, batch: Any) -> Tensor | None:
        if self.sliced is None or callable(self.score) or not self.sliced.applies(batch):
            return None
        result = self.sliced.scores(model, batch, self.score)
        return None if result is None else _counted(result, batch)

    def _forward(self, model: nn.Module) -> Callable[..., Any]:
        if self.compile is None:
            return model
        if self._compiled is None or self._compiled[0] is not model:
            self._compiled = model, self.compile(model)
        return self._compiled[1]


def _gradient_norms(model: nn.Module, pool: PooledBatches, head: Head) -> Tensor:
    def losses() -> Iterator[Tensor]:
        for batch in pool.chunks(1):
            yield _counted(head.losses(model(**head.model_inputs(batch)), batch), batch).sum()

    with torch.enable_grad():
        return scores.gradient_norm(losses(), (p for p in model.parameters() if p.requires_grad))
