"""A loss made without logits, as TRL's trainers make it, and the logits that its forward pass would have had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hf_importance.batches.random import isolated_rng
from hf_importance.heads.sliced import SlicedHead, autocast_like_now
from hf_importance.heads.tasks import TokenHead
from hf_importance.objective.scorer import evaluation_mode


class FusedLoss:
    """Gives such a loss and, of the same pass, the logits that its trainer would make in a second one.

    Args:
        model: The unwrapped model; its decoder's result is what its output layer is applied to.
        head: Its head.
        sharded: Whether parameters are whole only inside the wrapped model's forward: then a second pass it stays.
    """

    def __init__(self, model: nn.Module, head: Any, sharded: bool) -> None:
        self._model, self._head = model, head
        self._decoder: nn.Module | None = getattr(model, "get_decoder", lambda: None)()
        # The load balancing of experts is part of what the second pass gives.
        known = isinstance(head, TokenHead) and head.auxiliary_weight is None and not sharded
        self._sliced = SlicedHead(model, head) if known and self._decoder is not None else None

    def __call__(self, own: Callable[..., Any], model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """Give the loss of a micro-batch, and outputs with logits without a graph."""
        if self._sliced is None or not self._knows(batch):
            return own(model, dict(batch), True)
        seen: list[tuple[Tensor, Any]] = []

        def keep(module: nn.Module, arguments: Any, found: Any) -> None:
            hidden = found[0].detach()
            seen.append((hidden, autocast_like_now(hidden.device)))

        hook = self._decoder.register_forward_hook(keep)
        try:
            loss = own(model, dict(batch), False)
        finally:
            hook.remove()
        hidden, autocast = seen[0]  # a trainer that looks at its loss in another pass does so afterwards
        with torch.no_grad(), autocast:
            return loss, CausalLMOutput(loss=loss, logits=self._sliced.logits(hidden))

    def _knows(self, batch: dict[str, Any]) -> bool:
        """Whether the output layer gives the model's logits: seen once, in a pass that leaves no trace."""
        if self._sliced.finish is None:
            with isolated_rng(0), evaluation_mode(self._model), torch.no_grad():
                self._sliced = self._sliced if self._sliced.hidden(self._model, batch) else None
        return self._sliced is not None
