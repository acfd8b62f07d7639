"""How the loss of a run is held against its head, and what that says; the comparison itself is :mod:`.proof`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_importance.batches.random import isolated_rng
from hf_importance.heads.class_weights import ClassWeightedHead, ClassWeights
from hf_importance.heads.head import Head
from hf_importance.objective.proof import COARSE, Evidence, compare, compare_values, verdict
from hf_importance.objective.scorer import evaluation_mode

if TYPE_CHECKING:
    from hf_importance.objective.loss import Objective


def evidence_of(
    objective: Objective,
    own: Callable[..., Any],
    model: nn.Module,
    batch: dict[str, Any],
    loss: Tensor,
    outputs: Any,
    num_items: Any,
) -> Evidence:
    """Compare a loss that the Trainer, the model or the user computed with what the head says.

    Args:
        objective: Has the head, and what is known of its class weights.
        own: See :meth:`.Objective.loss`.
        model: What was called.
        batch: The micro-batch.
        loss: As it was computed.
        outputs: The model's.
        num_items: ``num_items_in_batch``.

    Raises:
        ValueError: The loss is no function of the outputs, or one of something else as well.
    """
    assert objective.head is not None
    if outputs is None:
        raise ValueError("compute_loss gives no outputs where they are asked for by return_outputs=True")
    head = objective.head
    if objective.weights.known:
        head = ClassWeightedHead(head, objective.weights)
    if objective.fused and without_graph(head, outputs):
        return compare_values(loss, outputs, batch, head, _divisor(objective, head, batch, num_items, loss, outputs))
    found = compare(loss, outputs, batch, head, _divisor(objective, head, batch, num_items, loss, outputs))
    if found is None and not objective.sharded and not without_graph(head, outputs):
        # A compiled model gives a loss that is no function of its logits: look at the model itself, apart.
        eager = getattr(model, "_orig_mod", getattr(model, "module", model))
        with isolated_rng(0), evaluation_mode(eager), torch.enable_grad():
            loss, outputs = own(eager, dict(batch), True)
            found = compare(loss, outputs, batch, head, _divisor(objective, head, batch, num_items, loss, outputs))
    if found is None:
        raise ValueError("its loss is no function of the logits that it returns")
    return found


def without_graph(head: Head, outputs: Any) -> bool:
    """Whether outputs were made apart from the loss, without gradients."""
    return not any(part.requires_grad for part in head.logits(outputs))


def _divisor(
    objective: Objective, head: Head, batch: dict[str, Any], num_items: Any, loss: Tensor, outputs: Any
) -> Any:
    """Give what a loss is divided by, over what the Trainer has multiplied it by."""
    scale, state = objective.scale, objective.weights.state
    assert scale is not None
    counted = objective.takes_items and num_items is not None and scale.over_step is not False
    if counted and (scale.over_step or not (state.whole or state.squares)):
        items = objective.ask_scale(scale.divisor, loss, outputs, batch, num_items)
    else:
        items = head.items(batch)
    return items / objective.multiplied_by(num_items)


def evidence_apart(head: Head, outputs: Any, batch: Mapping[str, Any]) -> Evidence:
    """See whether the loss that a user gives for an example depends on the others of its batch."""
    (logits,) = head.logits(outputs)
    losses = head.losses(outputs, batch)
    (found,) = torch.autograd.grad(losses[0], logits, retain_graph=True)
    with torch.no_grad():
        rows = found.reshape(len(found), -1).norm(dim=1).double()
        rest = rows[1:].sum() / rows.sum().clamp(min=1e-300)
        one = torch.ones_like(rest)
    return Evidence(torch.stack([one, one, rest, 0 * rest, one]).float(), COARSE)


def judge(
    found: list[Tensor], evidence: list[Evidence], weights: ClassWeights, learns: bool
) -> tuple[Tensor | None, bool, list[Tensor]]:
    """Say what evidence proves, where class weights may yet have to be learnt.

    Args:
        found: The figures of each, on the CPU.
        evidence: Of the micro-batches of one or several steps.
        weights: What is known of them.
        learns: Whether they may be learnt from it.

    Returns:
        The figures of what speaks against the head, and is explained by no class weights; whether something speaks for
        it; and of what would teach something of class weights the rows, see :meth:`.ClassWeights.learn`.
    """
    against, proof, news = None, False, []
    for number, (figures, one) in enumerate(zip(found, evidence, strict=True)):
        bad, good = verdict(figures, one.tolerance)
        told = one.told() if learns and not weights.known and (bad or weights.learning) else None
        if told is not None:
            more = torch.tensor([number, one.tolerance, one.classes], dtype=torch.float64).expand(len(told), 3)
            rows = torch.cat([told, more], 1)
            # A row has a factor only where it points as the head's does; where all are 1, another thing is wrong.
            low, high, rest = figures[:3].tolist()
            points = rest <= one.tolerance and (not bad or max(1 - low, high - 1) > one.tolerance)
            explained = weights.news(rows) if points else None
            news += [rows] if explained else []
            against = figures if explained is None else against
        elif bad:
            against = figures
        else:
            proof |= good and not weights.learning
    return against, proof, news
