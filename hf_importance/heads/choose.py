"""Which head a model has: chosen by its task's name, or a user's own loss.

The trainer asks a head about a batch: the loss of each example, its score, and the number of items that the loss is
an average over (a classifier has one an example, a language model its tokens). The name is the suffix that
transformers gives its classes (``...ForSequenceClassification``) or the model's attribute ``loss_type``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_importance.heads.head import Head
from hf_importance.heads.tasks import (
    ClassificationHead,
    MultimodalHead,
    QuestionAnsweringHead,
    SegmentationHead,
    SequenceToSequenceHead,
    TokenHead,
)
from hf_importance.heads.user_loss import FunctionHead

CLASSIFICATION = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)
CHOICE = ("ForMultipleChoice", "ForNextSentencePrediction")
TOKENS = ("ForTokenClassification", "ForMaskedLM")
CAUSAL = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead")
GENERATION = ("ForConditionalGeneration", "EncoderDecoderModel", "MarianMTModel")
ANSWERS = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
SEGMENTATION = ("ForSemanticSegmentation",)
KNOWN_TASKS = (*CLASSIFICATION, *CHOICE, *TOKENS, *CAUSAL, *GENERATION, *ANSWERS, *SEGMENTATION)


def head_of(model: nn.Module, label_smoothing: float, compute_loss_func: Callable[..., Tensor] | None) -> Head | None:
    """Choose the head of a model by its task.

    Args:
        model: The unwrapped model. One from outside transformers says its task by an attribute ``loss_type``, such
            as ``"ForSequenceClassification"``, or by its class's name.
        label_smoothing: ``label_smoothing_factor`` of the training arguments.
        compute_loss_func: The user's loss, which takes the place of the model's own.

    Returns:
        The head, or None where the task is not one whose loss is known to split by example.
    """
    config = getattr(model, "config", None)
    if compute_loss_func is not None:
        return FunctionHead(compute_loss_func, shift=_is(model, CAUSAL) and not _has_decoder(config))
    if _is(model, CHOICE):
        return ClassificationHead("single_label_classification", None, label_smoothing)
    if _is(model, CLASSIFICATION):
        problem_type = getattr(config, "problem_type", None)
        return ClassificationHead(problem_type, getattr(config, "num_labels", None), label_smoothing)
    if _is(model, ANSWERS):
        return QuestionAnsweringHead()
    if _is(model, SEGMENTATION):
        return SegmentationHead(getattr(config, "semantic_loss_ignore_index", 255))
    return _token_head(model, config, label_smoothing)


def _token_head(model: nn.Module, config: Any, label_smoothing: float) -> Head | None:
    if _is(model, GENERATION) and _has_decoder(config):
        # An EncoderDecoderModel makes more of the labels than the decoder's inputs: their attention mask.
        own = None if _is(model, ("EncoderDecoderModel",)) else "prepare_decoder_input_ids_from_labels"
        return SequenceToSequenceHead(own and getattr(model, own, None), label_smoothing)
    if _is(model, TOKENS):
        return TokenHead(shift=False, label_smoothing=label_smoothing)
    if not (_is(model, CAUSAL) or _is(model, GENERATION)):
        return None
    text = getattr(config, "get_text_config", lambda: config)()
    weight = getattr(text, "router_aux_loss_coef", getattr(text, "aux_loss_coef", None))
    kind = MultimodalHead if _is(model, GENERATION) else TokenHead
    return kind(shift=True, label_smoothing=label_smoothing, auxiliary_weight=weight)


def _is(model: nn.Module, tasks: tuple[str, ...]) -> bool:
    # `loss_type` is what transformers itself chooses the loss by; the class name covers models that are not its own.
    # A user's subclass is what its base is.
    names = " ".join([str(getattr(model, "loss_type", None)), *(base.__name__ for base in type(model).__mro__)])
    return any(re.search(rf"{task}\b", names) for task in tasks)


def _has_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))
