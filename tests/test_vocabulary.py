"""Scores of a language model by slices of its hidden states are those of its full logits, and no full logits exist."""

import pytest
import torch
import toys
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_importance import ImportanceTrainer
from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.heads import losses, sliced
from hf_importance.heads.choose import head_of
from hf_importance.heads.sliced import SlicedHead

SIZES = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def with_a_bias_behind():
    """A model that adds something behind its output layer that no config names."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    own = model.forward

    def forward(**inputs):
        outputs = own(**inputs)
        outputs.logits = outputs.logits + 3.0 * torch.arange(300) / 300
        return outputs

    model.forward = forward
    return model


MODELS = {
    "Llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)),
    "GPT-2": lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)),
    "Gemma 2, soft-capped": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(**SIZES, final_logit_softcapping=0.3)
    ),
    "Granite, divided": lambda: AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=7.0)),
    "Cohere, scaled": lambda: AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=0.0625)),
    "BERT, masked": lambda: BertForMaskedLM(
        BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
}


def batch_of(rows=4, length=9, vocabulary_size=300):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary_size, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[0, 4:] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@pytest.mark.parametrize("kind", ["upper_bound", "loss"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_slices_give_the_scores_of_full_logits(name, smoothing, kind, monkeypatch):
    monkeypatch.setattr(sliced, "PIECE", 2 * 300)  # two rows of logits at a time
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(30)  # so that logits, caps and scales matter
    head = head_of(model, smoothing, None)
    slices, pool = SlicedHead(model, head), PooledBatches([batch_of()], Padding())
    largest = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, i, out: largest.append(out.numel()))
    found = toys.score_pool(model, pool, head, kind, sliced=slices)
    handle.remove()
    assert slices.layer is not None
    assert max(largest) <= 4 * 300  # one position a text, then two rows at a time: never 4 * 9 * 300
    torch.testing.assert_close(found, toys.score_pool(model, pool, head, kind), rtol=1e-4, atol=1e-5)


def test_a_model_that_goes_on_behind_its_output_layer_is_scored_from_full_logits(monkeypatch):
    monkeypatch.setattr(sliced, "PIECE", 600)
    model = with_a_bias_behind().eval()
    head = head_of(model, 0.0, None)
    slices, pool = SlicedHead(model, head), PooledBatches([batch_of()], Padding())
    found = toys.score_pool(model, pool, head, "upper_bound", sliced=slices)
    assert slices.layer is None
    torch.testing.assert_close(found, toys.score_pool(model, pool, head, "upper_bound"), rtol=0, atol=0)


def test_small_vocabularies_are_left_alone():
    model = MODELS["Llama"]().eval()
    slices = SlicedHead(model, head_of(model, 0.0, None))
    assert losses.PIECE > 4 * 9 * 300
    assert not slices.applies(batch_of())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_with_slices_is_the_run_without(tmp_path, monkeypatch, bf16):
    data = toys.Dataset.from_dict({n: v.tolist() for n, v in batch_of(rows=64).items()}).with_format("torch")
    found = []
    for piece in (2**24, 600):
        monkeypatch.setattr(sliced, "PIECE", piece)
        torch.manual_seed(0)
        args = toys.always_on(tmp_path, per_device_train_batch_size=8, max_steps=3, logging_steps=3, bf16=bf16)
        trainer = toys.run(ImportanceTrainer, MODELS["Llama"](), args, data)
        found.append(next(e["loss"] for e in trainer.state.log_history if "loss" in e))
    assert found[0] == pytest.approx(found[1], rel=1e-2 if bf16 else 1e-5)
