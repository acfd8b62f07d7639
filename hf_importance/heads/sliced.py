"""Scoring a language model without its logits: the output layer is applied to slices of the hidden states.

A batch of ``b`` texts of ``T`` tokens has ``b * T * vocabulary`` logits, for most models by far the largest tensor
there is. A score needs each row of it once. So the scoring pass lets the output layer see one position a text, keeps
the hidden states that were meant for it, and applies it to as many rows at a time as make a piece of fixed size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.heads import losses, scores
from hf_importance.heads.head import logits_of
from hf_importance.heads.losses import PIECE
from hf_importance.heads.tasks import TokenHead

Finish = Callable[[Tensor], Tensor]


def finishes(config: Any) -> list[Finish]:
    """Give what models of transformers do to the output layer's result, by the names their configs have for it."""
    found: list[Finish] = [lambda logits: logits]
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3, NanoChat
    if cap is not None:
        found.append(lambda logits: cap * torch.tanh(logits / cap))
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is not None:
        found.append(lambda logits: logits / divisor)
    factor = getattr(config, "logit_scale", None)  # Cohere
    if factor is not None:
        found.append(lambda logits: logits * factor)
    return found


class SlicedHead:
    """Scores token losses without all logits at once, for models whose output layer allows it.

    What a model does behind its output layer is told from one position: the first of ``finishes`` that gives the
    model's own logits there. Where none does (a bias added elsewhere, another layer behind it), :meth:`scores` gives
    None and the caller scores from full logits.

    Args:
        model: The module that scoring runs.
        head: Its head.

    Attributes:
        finish: What the model does behind its output layer, once that is known.
    """

    def __init__(self, model: nn.Module, head: TokenHead) -> None:
        self.head = head
        self.layer: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
        self._candidates = finishes(text)
        self.finish: Finish | None = None

    def applies(self, inputs: Mapping[str, Any]) -> bool:
        """Say whether slices are worth it: whether the logits of the batch would be more than one piece."""
        weight = getattr(self.layer, "weight", None)
        labels = inputs.get("labels")
        return weight is not None and labels is not None and labels.numel() * len(weight) > PIECE

    def scores(self, model: nn.Module, inputs: Mapping[str, Any], kind: str) -> Tensor | None:
        """Score each example of a batch.

        Args:
            model: The module, in ``eval()``; called without gradients.
            inputs: The batch, with its labels.
            kind: ``"upper_bound"`` or ``"loss"``.

        Returns:
            Shape ``(b,)``, float32; None where the model's logits are not the output layer's, finished in a known way.
        """
        found = self.hidden(model, inputs)
        if found is None:
            return None
        with found[1]:
            return self._in_slices(found[0], inputs, kind)

    def logits(self, hidden: Tensor) -> Tensor:
        """Give the logits of hidden states, shape ``(..., vocabulary)``, once it is known how they are made."""
        return self.finish(self.layer(hidden))

    def hidden(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any] | None:
        """Give what a batch brings to the output layer, ``(b, T, width)``, and the autocast there; None as above."""
        seen: list[tuple[Tensor, Any]] = []

        def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = arguments[0]
            seen.append((hidden, autocast_like_now(hidden.device)))
            return (hidden[:, :1],)

        hook = self.layer.register_forward_pre_hook(keep)
        try:
            probe = logits_of(model(**self.head.model_inputs(inputs)))
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0][0].dim() != 3:
            self.layer = None  # called in another way than once on (b, T, width)
            return None
        hidden, autocast = seen[0]
        with autocast:
            if self.finish is None:
                self.finish = self._find_finish(hidden[:, :1], probe)
        if self.finish is None:
            self.layer = None
            return None
        return hidden, autocast

    def _find_finish(self, hidden: Tensor, probe: Tensor) -> Finish | None:
        raw = self.layer(hidden)
        tolerance = 4 * torch.finfo(raw.dtype).eps
        for finish in self._candidates:
            found = finish(raw)
            if found.shape == probe.shape and torch.allclose(found.float(), probe.float(), tolerance, tolerance):
                return finish
        return None

    def _in_slices(self, hidden: Tensor, inputs: Mapping[str, Any], kind: str) -> Tensor:
        targets = self.head.targets(inputs, hidden.shape[1])
        rows = max(1, PIECE // len(self.layer.weight))
        found = []
        for states, labels in zip(hidden.flatten(0, 1).split(rows), targets.reshape(-1).split(rows), strict=True):
            logits = self.logits(states)
            if kind == "loss":
                found.append(losses.cross_entropy(logits, labels, self.head.label_smoothing))
            else:
                found.append(scores.upper_bound(logits, labels, self.head.label_smoothing))
        per_token = torch.cat(found).view(targets.shape)
        return per_token.sum(dim=-1) if kind == "loss" else self.head.aggregate(per_token)


def autocast_like_now(device: torch.device) -> contextlib.AbstractContextManager:
    """Give a context with the autocast that is in force now: the slices run outside the model's own forward."""
    kind = device.type
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
