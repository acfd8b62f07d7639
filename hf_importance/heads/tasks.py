"""What a model's task head means: how its loss splits by example, its closed-form score, and what it counts.

One class for each family of losses. :func:`hf_importance.heads.choose.head_of` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, WEIGHTS
from hf_importance.heads import losses, scores
from hf_importance.heads.head import Head, logits_of


class ClassificationHead(Head):
    """One class, several labels, or numbers for each example: of a text, image, recording, video, or of its choices.

    Args:
        problem_type: ``"single_label_classification"``, ``"multi_label_classification"``, ``"regression"``, or None:
            told from the labels, as transformers does.
        num_labels: Classes, labels, or outputs of the model; None where it does not say.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.
    """

    def __init__(self, problem_type: str | None, num_labels: int | None, label_smoothing: float) -> None:
        self.problem_type = problem_type
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing

    def _kind(self, labels: Tensor) -> str:
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1 or (self.num_labels is None and labels.is_floating_point() and labels.dim() == 1):
            return "regression"
        several = labels.is_floating_point() and labels.dim() > 1
        return "multi_label_classification" if several else "single_label_classification"

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example; see :class:`Head`."""
        logits, labels = logits_of(outputs), self.labels(inputs)
        kind = self._kind(labels)
        if kind == "single_label_classification":
            return losses.cross_entropy(logits, labels, self.label_smoothing)
        if kind == "multi_label_classification":
            return losses.binary_cross_entropy(logits, labels)
        return losses.squared_error(logits, labels)

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the score of each example; see :class:`Head`."""
        logits, labels = logits_of(outputs), self.labels(inputs)
        kind = self._kind(labels)
        if kind == "single_label_classification":
            return scores.upper_bound(logits, labels, self.label_smoothing)
        if kind == "multi_label_classification":
            return scores.binary_upper_bound(logits, labels)
        return scores.squared_error_upper_bound(logits, labels)

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the examples whose label is not ignored; see :class:`Head`."""
        labels = self.labels(inputs)
        if self._kind(labels) == "single_label_classification":
            return (labels != IGNORED_LABEL).sum()
        return torch.full((), len(labels), device=labels.device)


class TokenHead(Head):
    """One class for each token: token classification, language models of all kinds, sequence-to-sequence models.

    Args:
        shift: Whether the logits of a token are for the label of the next one, as in causal language models.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.
        aggregate: Makes the score of an example, ``(b,)``, of those of its tokens, ``(b, tokens)``:
            :func:`~hf_importance.heads.scores.root_of_squares`, or :func:`~hf_importance.heads.scores.sum_of_norms`.
        auxiliary_weight: What the entry ``aux_loss`` of the outputs is multiplied by before the model adds it.
    """

    def __init__(
        self,
        shift: bool,
        label_smoothing: float,
        aggregate: Callable[[Tensor], Tensor] = scores.root_of_squares,
        auxiliary_weight: float | None = None,
    ) -> None:
        self.shift = shift
        self.label_smoothing = label_smoothing
        self.aggregate = aggregate
        self.auxiliary_weight = auxiliary_weight

    def targets(self, inputs: Mapping[str, Any], length: int | None = None) -> Tensor:
        """Give the label that each of ``length`` positions of the logits is for, shape ``(b, length)``."""
        # Collators that pack several texts into a row shift the labels themselves.
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        labels = self.labels(inputs)
        # Prompt tuning puts logits of its own in front of those of the labels.
        in_front = 0 if length is None else length - labels.shape[1]
        if self.shift:
            return F.pad(labels, (in_front, 1), value=IGNORED_LABEL)[:, 1:]
        return F.pad(labels, (in_front, 0), value=IGNORED_LABEL)

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example, summed over its tokens; see :class:`Head`."""
        logits = logits_of(outputs)
        return losses.token_cross_entropy(logits, self.targets(inputs, logits.shape[1]), self.label_smoothing)

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the aggregate of its tokens' scores for each example; see :class:`Head`."""
        logits = logits_of(outputs)
        return self.aggregate(scores.token_norms(logits, self.targets(inputs, logits.shape[1]), self.label_smoothing))

    def rows(self, gradient: Tensor) -> Tensor:
        """Give a gradient at the logits by tokens; see :class:`Head`."""
        return gradient.flatten(0, -2)

    def row_norms(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the length of each token's gradient; see :class:`Head`."""
        logits = logits_of(outputs)
        return (
            scores.token_norms(logits, self.targets(inputs, logits.shape[1]), self.label_smoothing).double().flatten()
        )

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the tokens that are predicted and not ignored; see :class:`Head`."""
        return (self.targets(inputs) != IGNORED_LABEL).sum()

    def auxiliary(self, outputs: Any) -> Tensor | None:
        """Give the load balancing loss of a mixture of experts, if the model computes it; see :class:`Head`."""
        found = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        return None if found is None or self.auxiliary_weight is None else self.auxiliary_weight * found


class SequenceToSequenceHead(TokenHead):
    """One class for each token that a decoder gives; its inputs are made of the labels.

    Args:
        decoder_inputs: The model's ``prepare_decoder_input_ids_from_labels``. None: the model is called with the
            labels, and the loss that it computes of them is left unused.
        label_smoothing: As for :class:`TokenHead`.
        aggregate: As for :class:`TokenHead`.
    """

    def __init__(
        self,
        decoder_inputs: Callable[..., Tensor] | None,
        label_smoothing: float,
        aggregate: Callable[[Tensor], Tensor] = scores.root_of_squares,
    ) -> None:
        super().__init__(shift=False, label_smoothing=label_smoothing, aggregate=aggregate)
        self.decoder_inputs = decoder_inputs

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give the batch without its labels, with the decoder's inputs that the model makes of them."""
        given = super().model_inputs(inputs)
        if any(given.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            return given
        labels = self.labels(inputs)
        if self.decoder_inputs is None:
            return {**given, "labels": labels}
        return {**given, "decoder_input_ids": self.decoder_inputs(labels=labels)}


class MultimodalHead(TokenHead):
    """One class for each token of a text between images or sounds.

    The model keeps its labels: some merge them with the places of the images, or mask attention by them.
    """

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give the batch with its labels."""
        return {name: value for name, value in inputs.items() if name != WEIGHTS}


class QuestionAnsweringHead(Head):
    """Where an answer starts and where it ends: the mean of two cross-entropies over the tokens of an example.

    A position behind the last token is ignored. Where a batch ignores starts and ends in unequal number, models
    average the two apart; here all that remain have the same weight.
    """

    label_names = ("start_positions", "end_positions")

    def _parts(self, outputs: Any, inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for position, part in enumerate(("start", "end")):
            logits = logits_of(outputs, f"{part}_logits", position)
            parts.append((logits, _within(self.labels(inputs)[f"{part}_positions"], logits.shape[1])))
        return parts

    def logits(self, outputs: Any) -> list[Tensor]:
        """Give those of starts and of ends; see :class:`Head`."""
        return [logits_of(outputs, f"{part}_logits", position) for position, part in enumerate(("start", "end"))]

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example; see :class:`Head`."""
        start, end = (losses.cross_entropy(logits, labels) for logits, labels in self._parts(outputs, inputs))
        return (start + end) / 2

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the norm of the gradient with respect to both logits together; see :class:`Head`."""
        start, end = (scores.upper_bound(logits, labels) for logits, labels in self._parts(outputs, inputs))
        return torch.hypot(start, end) / 2

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the starts and ends within the text, by halves; see :class:`Head`."""
        tokens = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        found = [_within(labels, tokens.shape[1]) != IGNORED_LABEL for labels in self.labels(inputs).values()]
        return torch.stack(found).sum() / 2


def _within(positions: Tensor, length: int) -> Tensor:
    """Mark positions outside the text as ignored, as transformers does: those before it count as the first."""
    positions = positions.view(-1).clamp(min=0)
    return positions.masked_fill(positions >= length, IGNORED_LABEL)


class SegmentationHead(Head):
    """One class for each pixel, from logits of a lower resolution that are interpolated to that of the labels.

    Args:
        ignored_label: Class that the loss leaves out.
    """

    def __init__(self, ignored_label: int) -> None:
        self.ignored_label = ignored_label

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example, summed over its pixels; see :class:`Head`."""
        return losses.pixel_cross_entropy(logits_of(outputs), self.labels(inputs), self.ignored_label)

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the norm with respect to the logits before interpolation, one example at a time; see :class:`Head`."""
        labels = self.labels(inputs).split(1)
        return torch.cat(
            [
                scores.logit_gradient_norm(
                    partial(losses.pixel_cross_entropy, labels=target, ignored_label=self.ignored_label), one
                )
                for one, target in zip(logits_of(outputs).split(1), labels, strict=True)
            ]
        )

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count the pixels whose label is not ignored; see :class:`Head`."""
        return (self.labels(inputs) != self.ignored_label).sum()
