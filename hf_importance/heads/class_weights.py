r"""Class weights that a loss has and nobody named: learnt from the rows that would prove it.

Of a loss with class weights the factor of row ``i`` over the head's, times the ``n`` items of its batch, is one of

.. math:: r_i = \kappa\, c_{y_i} \frac{n}{\sum_j c_{y_j}} \quad\text{or}\quad r_i = c_{y_i},

torch's weighted mean (``F.cross_entropy(weight=c)``), or weighted losses divided by their number. Either is the same
for all rows of a class but for one number of the batch, so batches with a class in common tell the weights of the
others; which of the two it is, batches of different mixtures tell. What contradicts itself is no class weight.

What a uniform step multiplies an example by is, on average, not :math:`c_y / \bar c`: the sum below it holds the
example itself. So one that is drawn gets what batches that hold it would have given it: batches cut at random out of
its pool (:meth:`ClassWeights.in_blocks`, exact), or for visits the expectation over independent draws from the classes
that were seen (:meth:`ClassWeights.on_average`; of ``N`` examples it is right to a part in ``N``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from hf_importance.batches.entries import WEIGHTS
from hf_importance.checkpoint.schema import integer, listed, number
from hf_importance.heads.head import Head
from hf_importance.transfer import to_device

# Batches are cut out of a pool so many times, so that their sums are no noise of their own.
CUTS = 8
# Points of the integral of on_average, evenly in log t: the trapezoid rule is exact to 1e-9 with them.
POINTS = 1024

_SUMS = listed(number(-1, 1e300))


@dataclass
class WeightState:
    """What is known of the weights, the same on all ranks; it goes into the checkpoint."""

    products: Annotated[list[float], _SUMS] = field(default_factory=list)  # Σ own · head's gradient, of each class
    squares: Annotated[list[float], _SUMS] = field(default_factory=list)  # Σ head's²; 0 only met, -1 not even that
    mean: float | None = None  # κ, the mean factor of a batch, if it is a weighted mean
    by_sum: bool = True  # whether that is still possible
    by_count: bool = True  # whether the other is
    left: Annotated[int, integer(-1)] = -1  # uniform steps until all of the dataset was seen; -1: nobody knows
    known: bool = False  # whether importance sampling goes by them
    whole: bool = False  # whether the Trainer's scale of the loss is left as it is, see Objective
    outside: bool = False  # whether ours is called around the user's compute_loss, see Watch
    counts: Annotated[list[float], _SUMS] = field(default_factory=list)  # examples of each class, at the last decision
    recent: Annotated[list[float], _SUMS] = field(default_factory=list)  # since then; in training those of this rank


class ClassWeights:
    """Learns the weights, and says what each example counts.

    Args:
        state: What is known of them.
    """

    def __init__(self, state: WeightState | None = None) -> None:
        self.state = state or WeightState()
        self._on: dict[torch.device, Tensor] = {}
        self._average: tuple[int, Tensor] | None = None

    @property
    def known(self) -> bool:
        """Whether the weights are known, and importance sampling goes by them."""
        return self.state.known

    @property
    def learning(self) -> bool:
        """Whether some are, and not all."""
        return bool(self.state.squares) and not self.state.known

    # ---- Learn ----

    def learn(self, rows: Tensor) -> bool:
        """Take in what proofs found, and say whether class weights explain it. All ranks must give the same.

        Args:
            rows: Of each example its class, the product of its gradient with the head's, the square of the head's,
                the number of its batch, the tolerance, and the number of classes; float64, shape ``(m, 6)``.
        """
        if not len(rows):
            return True
        state, classes = self.state, int(rows[0, 5])
        if not state.squares:
            state.squares = [-1.0] * classes
            state.products, state.counts, state.recent = ([0.0] * classes for _ in range(3))
        self._on = {}
        alike = len(state.squares) == classes and bool((rows[:, 5] == classes).all() and (rows[:, 0] < classes).all())
        return alike and all(self._explain(rows[rows[:, 3] == batch]) for batch in rows[:, 3].unique())

    def _explain(self, rows: Tensor) -> bool:
        state, label, tolerance = self.state, rows[:, 0].long(), float(rows[0, 4])
        products, squares = torch.tensor([state.products, state.squares], dtype=torch.float64)
        zeros = torch.zeros_like(squares)
        product, square = zeros.index_add(0, label, rows[:, 1]), zeros.index_add(0, label, rows[:, 2])
        factor, weight = product / square, products / squares  # of a class in this batch, and as it is known

        def alike(a: Tensor, b: Tensor) -> bool:
            return bool(((a - b).abs() <= tolerance * torch.maximum(a.abs(), b.abs())).all())

        measured = rows[:, 2] > 0
        own = rows[measured, 1] / rows[measured, 2]
        if not alike(own, factor[label[measured]]) or bool((own < 0).any()):
            return False
        common = (square > 0) & (squares > 0) & (weight > 0)
        scale = None
        if common.any():
            scale = (product * weight)[common].sum() / (square * weight**2)[common].sum()
            known = (square > 0) & (squares > 0)
            if not scale > 0 or not alike(factor[known], scale * weight[known]):
                return False
            state.by_count &= alike(scale, torch.ones_like(scale))
        elif not (squares > 0).any() or not state.by_sum:
            scale = torch.ones(())
        squares[label] = squares[label].clamp(min=0)
        if scale is not None:
            products, squares = products + product / scale, squares + square
        state.products, state.squares = products.tolist(), squares.tolist()
        if bool((square[label] > 0).all()):  # none of them is too well fitted to tell
            mean = factor[label].mean()
            state.mean = float(mean) if state.mean is None else state.mean
            state.by_sum &= alike(mean, torch.full_like(mean, state.mean))
        return state.by_sum or state.by_count

    def news(self, rows: Tensor) -> bool | None:
        """Say whether these rows would teach anything; None: class weights do not explain them."""
        trial = ClassWeights(copy.deepcopy(self.state))
        return trial.summary() != self.summary() if trial.learn(rows) else None

    def summary(self) -> tuple[bool, bool, list[int]]:
        """Give which kinds are possible, and of which classes the weight is known (1), or not though they were met."""
        state = self.state
        return state.by_sum, state.by_count, [(x > 0) - (x < 0) for x in state.squares]

    def settle(self, place: int, updates: int, uniform: bool) -> None:
        """A step has passed: say whether the weights of all classes that there are are known now.

        Args:
            place: Optimizer steps of its epoch before it.
            updates: Optimizer steps of an epoch; 0 for a stream.
            uniform: Whether it was uniform.
        """
        state = self.state
        if not self.learning or max(state.squares) <= 0:
            return
        if state.left < 0 and updates:  # the epoch goes from here to its end, or the next one does
            state.left = updates - place + (updates if place else 0)
        state.left = max(state.left - uniform, 0) if updates else -1
        products, squares = torch.tensor([state.products, state.squares], dtype=torch.float64)
        weight = (products / squares)[squares > 0]
        if state.by_sum and state.by_count and (weight.max() - weight.min()) <= 1e-3 * weight.max():
            resolved = True  # both say the same
        else:
            resolved = state.by_sum != state.by_count and not (state.by_sum and state.mean is None)
        state.known = bool(resolved and (squares != 0).all() and ((squares > 0).all() or state.left == 0))
        if state.known:
            state.by_sum = not state.by_count

    # ---- What an example counts ----

    def of(self, labels: Tensor) -> Tensor:
        """Give the weight of each label, 0 where it is ignored: float32, of the same shape and device."""
        if labels.device not in self._on:
            products, squares = torch.tensor([self.state.products, self.state.squares], dtype=torch.float64)
            weight = torch.where(squares > 0, products / squares, 0.0)
            # torch divides by their sum, so that only their ratios are known: the largest is 1.
            weight = weight / weight.max() if self.state.by_sum else weight
            self._on[labels.device] = weight.float().to(labels.device)
        weight = self._on[labels.device]
        inside = (labels >= 0) & (labels < len(weight))
        return torch.where(inside, weight[labels.clamp(0, len(weight) - 1)], 0.0)

    def items(self, labels: Tensor, counted: Tensor) -> Tensor:
        """Give what a batch's weighted losses are divided by, where it has so many items."""
        if not self.state.by_sum:
            return counted
        assert self.state.mean is not None
        return self.of(labels).sum() / self.state.mean

    def in_batch(self, labels: Tensor) -> Tensor:
        """Give what each example of a uniform batch counts, shape ``(b,)``."""
        return self.in_blocks(labels, len(labels), torch.arange(len(labels))[None])

    def in_blocks(self, labels: Tensor, size: int, order: Tensor) -> Tensor:
        """Give what examples of a pool count in batches that are cut out of it, on average over the cuts.

        Each is in one batch of each cut; the last batch of a cut is completed from its beginning. Whatever else is in
        a batch is exchangeable, so that the expectation over pools is that of a uniform step.

        Args:
            labels: Of the pool, shape ``(B,)``.
            size: Examples of a uniform batch, at most ``B``.
            order: Permutations of the pool that do not depend on it, shape ``(cuts, B)``; on the CPU.
        """
        weight = self.of(labels)
        if not self.state.by_sum:
            return weight
        assert self.state.mean is not None
        total, blocks = len(labels), -(-len(labels) // size)
        rows = order[:, torch.arange(blocks * size) % total].view(-1, size)
        rows = to_device(rows, labels.device)
        share = (labels >= 0)[rows].sum(1) / weight[rows].sum(1).clamp(min=1e-30)
        flat, zeros = rows.flatten(), torch.zeros_like(weight)
        mean = zeros.index_add(0, flat, share.repeat_interleave(size).to(weight))
        return self.state.mean * weight * mean / zeros.index_add(0, flat, torch.ones_like(flat, dtype=weight.dtype))

    def on_average(self, labels: Tensor, size: int) -> Tensor:
        r"""Give what examples count in a uniform batch of so many, on average over the others in it.

        With :math:`1 / x = \int_0^\infty e^{-tx} dt` the expectation over ``size - 1`` others of classes with shares
        :math:`f` is :math:`c_y \, \text{size} \int_0^\infty e^{-t c_y} (\sum_k f_k e^{-t c_k})^{\text{size} - 1} dt`.

        Args:
            labels: Shape ``(m,)``.
            size: Examples of a uniform batch.
        """
        if not self.state.by_sum:
            return self.of(labels)
        if self._average is None or self._average[0] != size:
            assert self.state.mean is not None
            weight = self.of(torch.arange(len(self.state.squares))).double()
            share = torch.tensor(self.state.counts, dtype=torch.float64)
            low, high = 1e-12 / size, 60 / float(weight[weight > 0].min())
            log = torch.linspace(math.log(low), math.log(high), POINTS, dtype=torch.float64)
            decay = torch.exp(-log.exp()[:, None] * weight)
            others = (decay @ (share / share.sum())) ** (size - 1)
            integral = torch.trapezoid((decay * (others * log.exp())[:, None]), log, dim=0)
            self._average = size, (self.state.mean * size * weight * integral).float()
        average = self._average[1].to(labels.device)
        return torch.where(labels >= 0, average[labels.clamp(min=0)], 0.0)

    def of_visits(self, head: Head, batch: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Give a batch of visits, which brings weights, with those of its classes too; see :meth:`on_average`."""
        counted = self.on_average(head.labels(batch), size)
        return {**batch, WEIGHTS: batch[WEIGHTS] * counted.to(batch[WEIGHTS].device)}

    # ---- Which classes there are ----

    def count(self, labels: list[Tensor]) -> None:
        """Count examples that were drawn uniformly on this rank."""
        state, classes = self.state, len(self.state.squares)
        if labels and classes:
            found = torch.cat([part.reshape(-1).long() for part in labels])
            new = torch.bincount(found[(found >= 0) & (found < classes)], minlength=classes)
            state.recent = [a + b for a, b in zip(state.recent, new.tolist(), strict=True)]

    def share_counts(self, recent: list[float]) -> None:
        """Take in what all ranks have counted since it was called last; between visits only."""
        self.state.counts = [a + b for a, b in zip(self.state.counts, recent, strict=True)]
        self.state.recent, self._average = [0.0] * len(recent), None


class ClassWeightedHead(Head):
    """A head whose losses have class weights: what a loss that is known to have them is proved by.

    Args:
        head: The model's.
        weights: Known ones.
    """

    def __init__(self, head: Head, weights: ClassWeights) -> None:
        self.head, self.weights = head, weights
        self.label_names, self.ignored_label = head.label_names, head.ignored_label

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the weighted loss of each example; see :class:`Head`."""
        return self.weights.of(self.labels(inputs)) * self.head.losses(outputs, inputs)

    def logits(self, outputs: Any) -> list[Tensor]:
        """Give those of the head."""
        return self.head.logits(outputs)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Give what the sum of the losses is divided by; see :class:`Head`."""
        return self.weights.items(self.labels(inputs), self.head.items(inputs))
