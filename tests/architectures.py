"""Tiny models of the architectures that people fine-tune, made from configs, each with a batch for its task.

``python tests/architectures.py`` prints the table of ``docs/heads.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_importance.reporting import markdown

VOCABULARY, CLASSES, LENGTH, PAD, IMAGE = 40, 4, 7, 1, 2
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model class with a tiny config.

    Attributes:
        family: Name that people know it by.
        task: Which of :data:`TASKS` it is trained for.
        model: Class name in transformers; its config is ``config`` with ``settings``.
        over_step: Whether its own loss is divided by ``num_items_in_batch`` when Trainer gives it.
        rows: Makes the inputs of ``size`` examples.
        pads: Whether a longer padding leaves its examples alone; images have none.
        since: The version of transformers that first makes its config.
    """

    family: str
    task: str
    model: str
    config: str
    settings: dict[str, Any]
    over_step: bool = False
    rows: Callable[[int], Batch] = field(default=lambda size: text(size))
    pads: bool = True
    since: str = "5.4"

    def build(self, **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        made = getattr(transformers, self.config)(**{**self.settings, **settings})
        model = getattr(transformers, self.model)._from_config(made)
        # The initial weights are so small that all logits are alike: every example would have the same score.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
        # EfficientNet draws these around 0: its signal would be gone after a few layers.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        return model

    def batch(self, size: int = 8, seed: int = 0) -> Batch:
        torch.manual_seed(seed)
        inputs = self.rows(size)
        return {**inputs, **LABELS[self.task](size, inputs)}


# ---- Inputs ----


def text(size: int) -> Batch:
    """Texts of different lengths, padded on the right."""
    lengths = torch.randint(3, LENGTH + 1, (size, 1))
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    tokens = torch.randint(3, VOCABULARY, (size, LENGTH)).where(mask.bool(), torch.tensor(PAD))
    return {"input_ids": tokens, "attention_mask": mask}


def text_with_end(size: int) -> Batch:
    """Texts that end with the token 2, which BART's classifier looks for."""
    batch = text(size)
    last = batch["attention_mask"].sum(1, keepdim=True) - 1
    return {**batch, "input_ids": batch["input_ids"].scatter(1, last, 2)}


def choices(size: int) -> Batch:
    return {name: value.view(size, 3, LENGTH) for name, value in text(3 * size).items()}


def images(pixels: int) -> Callable[[int], Batch]:
    return lambda size: {"pixel_values": torch.randn(size, 3, pixels, pixels)}


def video(size: int) -> Batch:
    return {"pixel_values": torch.randn(size, 2, 3, 8, 8)}


def sound(size: int) -> Batch:
    lengths = torch.randint(300, 401, (size, 1))
    mask = torch.arange(400) < lengths
    return {"input_values": torch.randn(size, 400) * mask, "attention_mask": mask.long()}


def spectrogram(size: int) -> Batch:
    return {"input_values": torch.randn(size, 24, 16)}


def spoken(size: int) -> Batch:
    return {"input_features": torch.randn(size, 8, 16)}


def illustrated(size: int) -> Batch:
    """Texts that begin with the four tokens of an image."""
    batch = text(size)
    tokens = torch.cat([torch.full((size, 4), IMAGE), batch["input_ids"]], 1)
    mask = torch.cat([torch.ones(size, 4, dtype=torch.long), batch["attention_mask"]], 1)
    return {"input_ids": tokens, "attention_mask": mask, "pixel_values": torch.randn(size, 3, 8, 8)}


# ---- Labels ----


def _of_tokens(classes: int, share_ignored: float = 0.0) -> Callable[[int, Batch], Batch]:
    def labels(size: int, inputs: Batch) -> Batch:
        ignored = torch.rand(size, LENGTH) < share_ignored
        if "attention_mask" in inputs:
            ignored |= inputs["attention_mask"] == 0
        ignored[:, 1] = False
        return {"labels": torch.randint(0, classes, (size, LENGTH)).masked_fill(ignored, -100)}

    return labels


def _of_answers(size: int, inputs: Batch) -> Batch:
    ends = inputs["attention_mask"].sum(1) - 1
    return {"start_positions": torch.rand(size).mul(ends).long(), "end_positions": ends}


def _causal(size: int, inputs: Batch) -> Batch:
    unread = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE)
    return {"labels": inputs["input_ids"].masked_fill(unread, -100)}


def _of_pixels(size: int, inputs: Batch) -> Batch:
    labels = torch.randint(0, CLASSES, (size, *inputs["pixel_values"].shape[2:]))
    return {"labels": labels.masked_fill(torch.rand(labels.shape) < 0.2, 255)}


LABELS: dict[str, Callable[[int, Batch], Batch]] = {
    "one class": lambda size, _: {"labels": torch.randint(0, CLASSES, (size,))},
    "several labels": lambda size, _: {"labels": torch.randint(0, 2, (size, CLASSES)).float()},
    "regression": lambda size, _: {"labels": torch.randn(size)},
    "multiple choice": lambda size, _: {"labels": torch.randint(0, 3, (size,))},
    "token classification": _of_tokens(CLASSES),
    "masked LM": _of_tokens(VOCABULARY, share_ignored=0.6),
    "causal LM": _causal,
    "sequence to sequence": _of_tokens(VOCABULARY),
    "question answering": _of_answers,
    "segmentation": _of_pixels,
}


# ---- Configs ----

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": PAD}
BERT = {**SMALL, **QUIET, **TEXT, "num_labels": CLASSES, "classifier_dropout": 0.0}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 32,
    "pad_token_id": PAD,
    "num_labels": CLASSES,
    **dict.fromkeys(("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"), 0.0),
}
DECODER = {**SMALL, **TEXT, "num_key_value_heads": 1, "head_dim": 8, "num_labels": CLASSES}
DECODER |= {"attention_dropout": 0.0, "classifier_dropout": 0.0}
EXPERTS = {**DECODER, "num_experts_per_tok": 1, "output_router_logits": True, "router_aux_loss_coef": 0.1}
MODERN = {
    **DECODER,
    **dict.fromkeys(("cls_token_id", "bos_token_id"), 3),
    **dict.fromkeys(("sep_token_id", "eos_token_id"), 2),
}
OPT = {**SMALL, **TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_labels": CLASSES, "dropout": 0.0}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": CLASSES,
    "problem_type": None,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"), 0.0),
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "num_labels": CLASSES,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    },
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"), 0.0),
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
    "eos_token_id": 2,
    "num_labels": CLASSES,
    "dropout_rate": 0.0,
    "classifier_dropout": 0.0,
}
VIT = {**SMALL, **QUIET, "image_size": 8, "patch_size": 4, "num_labels": CLASSES}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_labels": CLASSES}
SPEECH = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": CLASSES,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    **dict.fromkeys(
        (
            "hidden_dropout",
            "attention_dropout",
            "activation_dropout",
            "feat_proj_dropout",
            "final_dropout",
            "layerdrop",
        ),
        0.0,
    ),
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
    "num_labels": CLASSES,
    **QUIET,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}


# ---- The matrix ----


def _text(family: str, task: str, model: str, settings: dict, over_step: bool = False, **more: Any) -> Architecture:
    """Take the config's name from the model's: ``BertForMaskedLM`` has a ``BertConfig``."""
    config = more.pop("config", model.split("For")[0].removesuffix("LMHeadModel") + "Config")
    return Architecture(family, task, model, config, settings, over_step, **more)


def _vision(family: str, model: str, settings: dict, over_step: bool = False, **more: Any) -> Architecture:
    more = {"rows": images(8), "pads": False, "task": "one class", **more}
    return _text(family, more.pop("task"), model, settings, over_step, **more)


ARCHITECTURES = [
    _text("BERT", "one class", "BertForSequenceClassification", BERT),
    _text("BERT", "several labels", "BertForSequenceClassification", BERT),
    _text("BERT", "regression", "BertForSequenceClassification", {**BERT, "num_labels": 1}),
    _text("BERT", "token classification", "BertForTokenClassification", BERT),
    _text("BERT", "masked LM", "BertForMaskedLM", BERT),
    _text("BERT", "question answering", "BertForQuestionAnswering", {**BERT, "num_labels": 2}),
    _text("BERT", "multiple choice", "BertForMultipleChoice", {**BERT, "num_labels": 2}, rows=choices),
    _text("RoBERTa", "one class", "RobertaForSequenceClassification", BERT),
    _text("RoBERTa", "multiple choice", "RobertaForMultipleChoice", {**BERT, "num_labels": 2}, rows=choices),
    _text("XLM-R", "token classification", "XLMRobertaForTokenClassification", BERT),
    _text("DistilBERT", "one class", "DistilBertForSequenceClassification", DISTILBERT),
    _text("DistilBERT", "question answering", "DistilBertForQuestionAnswering", {**DISTILBERT, "num_labels": 2}),
    _text(
        "ALBERT",
        "one class",
        "AlbertForSequenceClassification",
        {**BERT, "embedding_size": 8, "classifier_dropout_prob": 0.0},
    ),
    _text("ELECTRA", "one class", "ElectraForSequenceClassification", {**BERT, "embedding_size": 8}),
    _text("DeBERTa-v2", "one class", "DebertaV2ForSequenceClassification", {**BERT, "pooler_hidden_size": 16}),
    _text("MPNet", "masked LM", "MPNetForMaskedLM", BERT),
    _text("ModernBERT", "one class", "ModernBertForSequenceClassification", MODERN, since="5.19"),
    _text("ModernBERT", "masked LM", "ModernBertForMaskedLM", MODERN, True, since="5.19"),
    _text("GPT-2", "causal LM", "GPT2LMHeadModel", GPT2, True),
    _text("GPT-2", "one class", "GPT2ForSequenceClassification", GPT2),
    _text("GPT-2", "token classification", "GPT2ForTokenClassification", GPT2),
    _text("GPT-NeoX", "causal LM", "GPTNeoXForCausalLM", {**DECODER, "hidden_dropout": 0.0}, True),
    _text("OPT", "causal LM", "OPTForCausalLM", OPT, True),
    _text("OPT", "one class", "OPTForSequenceClassification", OPT),
    _text("Llama", "causal LM", "LlamaForCausalLM", DECODER, True),
    _text("Llama", "one class", "LlamaForSequenceClassification", DECODER),
    _text("Llama", "token classification", "LlamaForTokenClassification", DECODER),
    _text("Llama", "question answering", "LlamaForQuestionAnswering", DECODER),
    _text("Mistral", "causal LM", "MistralForCausalLM", {**DECODER, "sliding_window": None}, True),
    _text("Qwen2", "causal LM", "Qwen2ForCausalLM", DECODER, True),
    _text("Qwen3", "causal LM", "Qwen3ForCausalLM", DECODER, True),
    _text("Gemma", "causal LM", "GemmaForCausalLM", DECODER, True),
    _text(
        "Phi", "causal LM", "PhiForCausalLM", {**DECODER, "num_key_value_heads": 2, **QUIET, "resid_pdrop": 0.0}, True
    ),
    _text("Mixtral", "causal LM", "MixtralForCausalLM", {**EXPERTS, "num_local_experts": 2}, True),
    _text(
        "Qwen2-MoE",
        "causal LM",
        "Qwen2MoeForCausalLM",
        {
            **EXPERTS,
            "num_experts": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "decoder_sparse_step": 1,
        },
        True,
    ),
    _text("T5", "sequence to sequence", "T5ForConditionalGeneration", T5),
    _text("T5", "one class", "T5ForSequenceClassification", T5, rows=text_with_end),
    _text("BART", "sequence to sequence", "BartForConditionalGeneration", BART),
    _text("BART", "one class", "BartForSequenceClassification", BART, rows=text_with_end),
    _text(
        "Marian", "sequence to sequence", "MarianMTModel", {**BART, "decoder_start_token_id": 0}, config="MarianConfig"
    ),
    _text(
        "Encoder-decoder of two BERTs",
        "sequence to sequence",
        "EncoderDecoderModel",
        {
            "encoder": {"model_type": "bert", **BERT},
            "decoder": {"model_type": "bert", **BERT, "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 0,
            "pad_token_id": PAD,
        },
        config="EncoderDecoderConfig",
    ),
    _text(
        "Whisper",
        "sequence to sequence",
        "WhisperForConditionalGeneration",
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "decoder_start_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "begin_suppress_tokens": None,
        },
        rows=spoken,
        pads=False,
    ),
    _text(
        "LLaVA",
        "causal LM",
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **SMALL, "image_size": 8, "patch_size": 4},
            "text_config": {"model_type": "llama", **DECODER},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
        True,
        rows=illustrated,
        pads=False,
    ),
    _vision("ViT", "ViTForImageClassification", VIT, True),
    _vision("ViT", "ViTForImageClassification", VIT, task="several labels"),
    _vision("DeiT", "DeiTForImageClassification", VIT, True),
    _vision("BEiT", "BeitForImageClassification", {**VIT, "drop_path_rate": 0.0}),
    _vision("DINOv2", "Dinov2ForImageClassification", VIT, True),
    _vision(
        "Swin",
        "SwinForImageClassification",
        {
            **QUIET,
            "image_size": 8,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 2,
            "drop_path_rate": 0.0,
            "num_labels": CLASSES,
        },
        True,
    ),
    _vision("ConvNeXt", "ConvNextForImageClassification", {**STAGES, "num_stages": 2}, rows=images(16)),
    _vision("ResNet", "ResNetForImageClassification", {**STAGES, "embedding_size": 8}, rows=images(16)),
    _vision(
        "RegNet", "RegNetForImageClassification", {**STAGES, "embedding_size": 8, "groups_width": 8}, rows=images(16)
    ),
    _vision(
        "MobileNetV2",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.1, "depth_divisible_by": 4, "num_labels": CLASSES, "classifier_dropout_prob": 0.0},
        rows=images(32),
    ),
    _vision(
        "EfficientNet",
        "EfficientNetForImageClassification",
        {
            "width_coefficient": 0.0125,
            "kernel_sizes": [3, 3],
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 6],
            "depth_coefficient": 1.0,
            "hidden_dim": 16,
            "num_labels": CLASSES,
            "dropout_rate": 0.0,
            "drop_connect_rate": 0.0,
        },
        rows=images(32),
    ),
    _vision("SegFormer", "SegformerForSemanticSegmentation", SEGFORMER, rows=images(16), task="segmentation"),
    _vision(
        "MobileNetV2",
        "MobileNetV2ForSemanticSegmentation",
        {"depth_multiplier": 0.1, "depth_divisible_by": 4, "num_labels": CLASSES, "classifier_dropout_prob": 0.0},
        rows=images(32),
        task="segmentation",
    ),
    _vision(
        "VideoMAE",
        "VideoMAEForVideoClassification",
        {**VIT, "num_frames": 2, "tubelet_size": 2},
        True,
        rows=video,
    ),
    _text("Wav2Vec2", "one class", "Wav2Vec2ForSequenceClassification", SPEECH, rows=sound),
    _vision(
        "AST",
        "ASTForAudioClassification",
        {
            **SMALL,
            **QUIET,
            "patch_size": 4,
            "time_stride": 4,
            "frequency_stride": 4,
            "max_length": 24,
            "num_mel_bins": 16,
            "num_labels": CLASSES,
        },
        True,
        rows=spectrogram,
    ),
]


def table() -> str:
    """The matrix as docs/heads.md prints it."""
    overs = {True: "the step", False: "the micro-batch"}
    rows = [[a.family, a.task, f"`{a.model}`", overs[a.over_step], "yes"] for a in ARCHITECTURES]
    return markdown.table(["architecture", "task", "class", "its own loss is a mean over", "tested"], rows, text=5)


if __name__ == "__main__":
    print(table())
