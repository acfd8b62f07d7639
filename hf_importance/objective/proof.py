r"""Whether a loss is the one that its head says: row by row at the logits, not by one number.

A head says how a loss splits by example, and what is drawn by it and weighted is right only if that is true. One
scalar proves nothing: a new head gives all classes the same probability, so that class weights cancel in the mean. So
the gradient of the loss that training really computed is compared with the head's own, with respect to the logits:

.. math:: \frac{\partial L}{\partial z_i} \cdot \text{items} = \frac{\partial \ell_i}{\partial z_i}
    \quad\text{for every row } i,

in length and in direction, and the values of both losses, which catches what does not pass through the logits. It
costs no pass of its own: both gradients end at the logits. A loss that reaches a parameter on another way than through
them has a term more, however small it is now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hf_importance.heads.head import Head
from hf_importance.heads.losses import PIECE

# Half precision knows 3 digits; in float32 the two agree to 1e-5.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
COARSE = 2e-2
# Above so many logits, rows are compared in length alone where the head knows it in closed form.
MANY_LOGITS = 1 << 26
# Rows whose gradient is below this share of the largest say nothing.
SMALLEST = 1e-3


@dataclass
class Evidence:
    """What one micro-batch says of a loss.

    Attributes:
        figures: On the device, float32, shape ``(5,)``: smallest and largest factor of a row, largest part of a row
            that is no multiple of the head's, relative difference of the values, and whether labels differ.
        tolerance: How far each may be from what it should be.
    """

    figures: Tensor
    tolerance: float


def compare(
    loss: Tensor, outputs: Any, batch: Mapping[str, Any], head: Head, items: Tensor | float
) -> Evidence | None:
    """Compare the loss of a micro-batch with what its head says.

    Args:
        loss: That training computed, a scalar with its graph, which is kept.
        outputs: Of the model, with their graph.
        batch: The micro-batch, with its labels.
        head: The model's head.
        items: What the loss is divided by.

    Returns:
        The evidence; None where the loss is no function of these logits.

    Raises:
        ValueError: It is one of something else as well.
    """
    logits = head.logits(outputs)
    if not loss.requires_grad or any(not part.requires_grad for part in logits):
        return None
    # As large as the sum of the examples' own: a mean over many would underflow in half precision.
    scale = (torch.zeros_like(loss) + items).to(loss.dtype)
    for sources in _sources(logits):
        found = torch.autograd.grad(loss, sources, scale, retain_graph=True, allow_unused=True)
        if all(part is not None for part in found):
            break
    else:
        return None
    auxiliary = head.auxiliary(outputs)
    if auxiliary is None and _goes_past(loss, sources):
        raise ValueError("the loss has a term that is no function of the logits, such as a penalty on parameters")
    with torch.enable_grad():
        total = head.losses(outputs, batch).sum()
    norms = head.row_norms(outputs, batch) if sum(part.numel() for part in logits) > MANY_LOGITS else None
    if norms is None:
        expected = torch.autograd.grad(total, sources, retain_graph=True)
        parts = [_sums(head.rows(own), head.rows(wanted)) for own, wanted in zip(found, expected, strict=True)]
    else:  # in length only: a second gradient of this size would be dear
        lengths = head.rows(found[0]).norm(dim=1, dtype=torch.float32).double()
        parts = [torch.stack([lengths**2, lengths * norms, norms**2])]
    with torch.no_grad():
        # Of each row: the square of its own length, the product with the head's, and the square of the head's.
        own, product, wanted = torch.cat(parts, dim=1)
        lengths = torch.maximum(own, wanted)
        counts = (lengths > SMALLEST**2 * lengths.max()) & (lengths > 0)
        factor = torch.where(counts & (wanted > 0), product / wanted.clamp(min=1e-300), 1.0)
        # A row that only one of the two has: nothing explains it.
        rest = (own - 2 * factor * product + factor**2 * wanted).clamp(min=0)
        rest = torch.where(counts, rest / lengths.clamp(min=1e-300), 0.0).sqrt()
        off = _difference(loss, total, auxiliary, items)
        figures = torch.stack([factor.min(), factor.max(), rest.max(), off, _varied(head, batch, counts)]).float()
    return Evidence(figures, TOLERANCE.get(found[0].dtype, COARSE))


@torch.no_grad()
def compare_values(
    loss: Tensor, outputs: Any, batch: Mapping[str, Any], head: Head, items: Tensor | float
) -> Evidence:
    """Compare the values alone, for a loss whose code is known, of outputs that it was not made of; as `compare`."""
    total = head.losses(outputs, batch).sum()
    off = _difference(loss, total, head.auxiliary(outputs), items)
    one = torch.ones_like(off)
    logits = head.logits(outputs)[0]
    figures = torch.stack([one, one, 0 * one, off, _varied(head, batch, one)]).float()
    return Evidence(figures, TOLERANCE.get(logits.dtype, COARSE))


def _difference(loss: Tensor, total: Tensor, auxiliary: Tensor | None, items: Tensor | float) -> Tensor:
    """Give how far the value of a loss is from the mean of a head's, relative to it."""
    value = loss.detach().double() - (0.0 if auxiliary is None else auxiliary.detach().double())
    mean = total.detach().double() / items
    return (value - mean).abs() / torch.maximum(value.abs(), torch.full_like(value, 1e-2))


def _sources(logits: list[Tensor]) -> Iterator[list[GradientEdge]]:
    """Give logits, and what they are copies of: a model computes its loss from these.

    Under mixed precision accelerate copies what a model returns to float32, and DDP all that it returns where it looks
    for unused parameters.
    """
    edges: list[GradientEdge] = [get_gradient_edge(part) for part in logits]
    while True:
        yield edges
        kinds = {edge.node.name() for edge in edges}
        if kinds == {"ToCopyBackward0"}:
            edges = [GradientEdge(*edge.node.next_functions[0]) for edge in edges]
        elif kinds == {"_DDPSinkBackward"}:
            edges = [GradientEdge(*edge.node.next_functions[edge.output_nr]) for edge in edges]
        else:
            return


@torch.no_grad()
def _sums(own: Tensor, wanted: Tensor) -> Tensor:
    """Give squares and products of rows, float64, shape ``(3, rows)``, a piece at a time."""
    size = max(1, PIECE // own.shape[1])
    sums = []
    for a, b in zip(own.split(size), wanted.split(size), strict=True):
        a, b = a.double(), b.double()
        sums.append(torch.stack([(a * a).sum(1), (a * b).sum(1), (b * b).sum(1)]))
    return torch.cat(sums, dim=1)


def _goes_past(loss: Tensor, logits: list[GradientEdge]) -> bool:
    """Say whether a way leads from the loss to a parameter that passes none of the logits."""
    passed: set[Any] = {edge.node for edge in logits}
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in passed:
            continue
        if hasattr(node, "variable"):
            return True
        passed.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False


def _varied(head: Head, batch: Mapping[str, Any], counts: Tensor) -> Tensor:
    """Say whether labels differ: in a batch of one class its weight cancels, so it proves nothing."""
    labels = head.labels(batch)
    some = counts.any().double()
    parts = list(labels.values()) if isinstance(labels, Mapping) else [labels]
    if any(not isinstance(part, Tensor) or part.is_floating_point() for part in parts):
        return some  # numbers, or several labels an example: nothing cancels
    read = [part[part != head.ignored_label] if part.device.type == "cpu" else part for part in parts]
    return some * torch.stack([(part.min() != part.max()) if part.numel() else some < 0 for part in read]).any()


def verdict(figures: Tensor, tolerance: float) -> tuple[bool, bool]:
    """Say whether the evidence speaks against the head, and whether it speaks for it.

    Args:
        figures: Of :class:`Evidence`, on the CPU.
        tolerance: Of the same.
    """
    low, high, rest, off, varied = figures.tolist()
    if math.isnan(low + high + rest + off):  # neither of the two is a number, which says nothing
        return False, False
    against = not (1 - tolerance <= low <= high <= 1 + tolerance and rest <= tolerance and off <= tolerance)
    return against, bool(varied) and not against


def describe(figures: Tensor) -> str:
    """Say what was found, for a warning."""
    low, high, rest, off, _ = figures.tolist()
    spread = max(high - 1, 1 - low)
    if max(rest, spread) <= min(off, COARSE):
        return f"its value differs by {off:.1%}: a term is added to it, or it is scaled"
    if rest > COARSE:
        return f"its gradient at the logits points elsewhere, by up to {rest:.1%} of an example's"
    return f"examples count {low:.3g} to {high:.3g} times: class weights, sample weights, or another mean"
