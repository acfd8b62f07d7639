"""Every feature of ``transformers.Trainer`` with importance sampling on: it does what it says, and steps stay on.

Two oracles: the plain ``Trainer`` (the own batches that each step starts from must be its own, whatever the sampler),
and the run without the feature (memory and speed features must not change what is learnt).
"""

import math
import os

import numpy as np
import pytest
import torch
import toys
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from hf_importance.batches.entries import WEIGHTS
from hf_importance.batches.pool import PooledBatches
from hf_importance.objective.scorer import score_outputs
from hf_importance.trainer import ImportanceMixin

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]", "[PAD]"]  # padding is not 0 on purpose
WORKERS_END = "ignore:.*multi-threaded, use of fork.*:DeprecationWarning"  # CPython's own, for any worker process


# ---- Pieces ----


class OwnBatches(Trainer):
    """Keeps the batches that Trainer's own loader gave each optimizer step, beneath the mixin."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.own_batches = getattr(self, "own_batches", [])
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.own_batches += [dict(batch) for batch in batches]
        return batches, items


class Watched(ImportanceMixin, OwnBatches):
    """Keeps what every micro-batch is trained on, with its weights."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.trained = [*getattr(self, "trained", []), *toys.handed(self, batches)]
        return batches, items


def watch(model, args, data, kind=Watched, **kwargs):
    """Train, and check what must hold for every feature; give the trainer."""
    trainer = kind(model=model, args=args, train_dataset=data, **kwargs)
    before = parameters(trainer)
    trainer.train()
    check_on(trainer)
    if trainer.model_init is None:
        assert not torch.equal(parameters(trainer), before)
    return trainer


def check_on(trainer):
    drawn = weighted(trainer)
    assert drawn, "no step was on"
    entries = losses(trainer)
    assert entries[-1]["importance/active_share"] > 0
    for entry in entries:
        # No toy here knows more than 50 classes at first; a wrong scale (accumulation, batch) would be 2 to 16 times.
        assert 0 < entry["loss"] < 1.5 * math.log(50)
        assert math.isfinite(entry["grad_norm"])
        assert entry["importance/nonfinite_steps"] == 0
    every = torch.cat([batch[WEIGHTS] for batch in drawn])
    assert every.dtype == torch.float32
    assert (every > 0).all()
    assert float(every.mean()) == pytest.approx(1, abs=0.35)
    assert float(every.std()) > 0


def weighted(trainer):
    return [batch for batch in trainer.trained if WEIGHTS in batch]


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer_or_model):
    model = getattr(trainer_or_model, "model", None)
    model = trainer_or_model if model is None or isinstance(trainer_or_model, torch.nn.Module) else model
    return torch.cat([p.detach().flatten().float().clone() for p in model.parameters()])


def sizes(batches, name="labels"):
    return [len(batch[name]) for batch in batches]


def same_batches(ours, plain):
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def check_own_batches(model, args, data, **kwargs):
    """The own batches of a run with importance sampling on are those of the plain Trainer."""
    ours = watch(model(), args(), data, **kwargs)
    plain = toys.run(OwnBatches, model(), args(), data, **kwargs)
    same_batches(ours.own_batches, plain.own_batches)
    assert ours.state.global_step == plain.state.global_step
    assert ours.state.epoch == plain.state.epoch
    return ours


def tokenizer(side="right"):
    vocabulary = {word: i for i, word in enumerate(WORDS + SPECIAL)}
    model = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        padding_side=side,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        pad_token="[PAD]",
    )


def texts(examples=96, seed=0):
    """Texts of 2 to 30 words, mostly short ones, so that the longest of a batch differs; the first tells the class."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, 4, examples)
    lengths = 1 + generator.geometric(0.2, examples).clip(1, 29)
    return [
        (" ".join([f"w{c}", *(f"w{i}" for i in generator.integers(4, 40, n - 1))]), int(c))
        for c, n in zip(classes, lengths, strict=True)
    ]


def tokenised(tok, **columns):
    rows = texts()
    encoded = tok([text for text, _ in rows])
    return Dataset.from_dict(
        {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **columns}
    )


def classified(tok):
    return tokenised(tok, labels=[label for _, label in texts()])


def small(kind, config, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(config(**{"vocab_size": len(WORDS + SPECIAL), "pad_token_id": 45, **sizes, **settings}))


def llama(**settings):
    return small(LlamaForCausalLM, LlamaConfig, bos_token_id=41, eos_token_id=44, **settings)


def t5(**settings):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=46, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, **settings
    )
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 45, 44, 45
    return T5ForConditionalGeneration(config)


# ---- Accumulation, length of the run ----


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_with_a_ragged_last_step(tmp_path, digits, accumulation):
    # 90 examples in batches of 16: five full ones and one of 10; the last optimizer step of an epoch is shorter.
    args = lambda: toys.always_on(  # noqa: E731
        tmp_path, gradient_accumulation_steps=accumulation, max_steps=-1, num_train_epochs=2, logging_steps=1
    )
    trainer = check_own_batches(toys.vit, args, digits.select(range(90)))
    assert sizes(trainer.trained) == [16, 16, 16, 16, 16, 10] * 2
    assert trainer.state.global_step == 2 * math.ceil(6 / accumulation)
    assert len(weighted(trainer)) == 12 - accumulation
    # Ten classes and small weights: ln 10 is what every step starts near. A wrong divisor would show as 2 or 4 times.
    assert losses(trainer)[1]["loss"] == pytest.approx(math.log(10), rel=0.15)


def test_fractional_epochs(tmp_path, digits):
    args = lambda: toys.always_on(tmp_path, max_steps=-1, num_train_epochs=1.5, logging_steps=3)  # noqa: E731
    trainer = check_own_batches(toys.vit, args, digits.select(range(96)))
    assert trainer.state.global_step == 9
    assert trainer.state.epoch == 1.5


def test_drop_last(tmp_path, digits):
    args = lambda: toys.always_on(  # noqa: E731
        tmp_path, dataloader_drop_last=True, max_steps=-1, num_train_epochs=1, logging_steps=1
    )
    trainer = check_own_batches(toys.vit, args, digits.select(range(90)))
    assert sizes(trainer.trained) == [16] * 5


# ---- Precision, memory, speed ----


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_scores_as_it_trains_and_gives_float32(tmp_path, digits, precision, dtype):
    model, seen = toys.vit(), []
    model.classifier.register_forward_hook(lambda module, _, out: seen.append((module.training, out.dtype)))
    logits = []

    def score(outputs, labels):
        logits.append(outputs.logits.dtype)
        return 1.0 + labels

    watch(model, toys.always_on(tmp_path, **{precision: True}), digits.select(range(128)), compute_score_func=score)
    if precision == "fp16" and {found for _, found in seen} == {torch.float32}:
        pytest.skip("on a CPU Trainer takes fp16=True and trains in float32")
    assert set(seen) == {(True, dtype), (False, dtype)}
    assert set(logits) == {torch.float32}


def test_bf16_autocast_is_near_float32(tmp_path, digits):
    last = [
        losses(watch(toys.vit(), toys.always_on(tmp_path, max_steps=4, **half), digits.select(range(128))))[-1]
        for half in ({}, {"bf16": True})
    ]
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=0.02)
    assert last[0]["importance/tau"] == pytest.approx(last[1]["importance/tau"], rel=0.02)


def test_bf16_weights_are_scored_in_float32(tmp_path):
    model = toys.bert().to(torch.bfloat16)
    trainer = watch(model, toys.always_on(tmp_path), toys.sentences())
    batch = trainer.trained[-1]
    with torch.no_grad():
        outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert outputs.logits.dtype == torch.bfloat16
    for kind in ("upper_bound", "loss"):
        assert score_outputs(outputs, batch, trainer._objective.head, kind).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the older name
@pytest.mark.parametrize(
    "name", [pytest.param("activation_checkpointing", marks=toys.since("5.17")), "gradient_checkpointing"]
)
def test_activation_checkpointing_recomputes_in_training_only_and_changes_nothing(tmp_path, name):
    ends = []
    for on in (False, True):
        model, calls = toys.bert(), []
        model.bert.encoder.layer[0].attention.register_forward_hook(
            lambda module, *_, calls=calls: calls.append(module.training)
        )
        args = toys.always_on(tmp_path, max_steps=3, logging_steps=3, **{name: on})
        trainer = watch(model, args, toys.sentences())
        assert calls.count(True) == (6 if on else 3)
        assert calls.count(False) == 2 * 3
        ends.append(parameters(trainer))
    torch.testing.assert_close(*ends)


@toys.since("5.17")
def test_activation_checkpointing_with_gradient_norm_scores(tmp_path):
    args = toys.always_on(tmp_path, activation_checkpointing=True, score="gradient_norm", max_steps=3, logging_steps=3)
    watch(toys.bert(), args, toys.sentences())


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # torch's own
def test_torch_compile_trains_near_the_run_without_it(tmp_path):
    trainer = watch(toys.bert(), toys.always_on(tmp_path, torch_compile=True, max_steps=3), toys.sentences())
    from torch._dynamo.eval_frame import OptimizedModule

    assert isinstance(trainer.model_wrapped, OptimizedModule)
    assert not isinstance(trainer.model, OptimizedModule)
    eager = watch(toys.bert(), toys.always_on(tmp_path, max_steps=3), toys.sentences())
    torch.testing.assert_close(parameters(trainer), parameters(eager), rtol=1e-3, atol=1e-4)


def test_neftune_puts_no_noise_into_scoring(tmp_path):
    model, seen = toys.bert(), []

    class Look(TrainerCallback):  # its hook runs behind NEFTune's own, which train() registers before
        def on_train_begin(self, args, state, control, **kwargs):
            embeddings = model.get_input_embeddings()
            embeddings.register_forward_hook(
                lambda module, inputs, out: seen.append((module.training, torch.equal(out, module.weight[inputs[0]])))
            )

    args = toys.always_on(tmp_path, neftune_noise_alpha=5, max_steps=4, logging_steps=4)
    watch(model, args, toys.sentences(), callbacks=[Look()])
    # (in training?, is it the plain embedding?)
    assert set(seen) == {(True, False), (False, True)}
    assert seen.count((False, True)) == 3 * 3


def test_the_batch_size_that_fits_is_found_and_the_pool_follows(tmp_path, digits):
    model, sizes_scored = toys.vit(), []

    def too_large(module, args, kwargs):
        if len(kwargs["pixel_values"]) > 8:
            raise RuntimeError("CUDA out of memory. (not really)")

    model.register_forward_pre_hook(too_large, with_kwargs=True)

    def score(outputs, labels):
        sizes_scored.append(len(labels))
        return 1.0 + labels

    args = toys.always_on(
        tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, max_steps=4, logging_steps=1
    )
    trainer = watch(model, args, digits.select(range(128)), compute_score_func=score)
    assert trainer.state.train_batch_size == 8
    assert sizes(weighted(trainer)) == [8] * 3
    # A uniform step, and three that score a pool of 24 and find in training what was kept of it.
    assert sizes_scored == [8] * (1 + 3 * (3 + 1))
    assert losses(trainer)[-1]["importance/examples_trained"] == 4 * 8


def test_no_memory_for_scoring_makes_the_batch_smaller_too(tmp_path, digits):
    model = toys.vit()

    def too_large(module, args, kwargs):
        if not module.training and len(kwargs["pixel_values"]) > 8:
            raise RuntimeError("CUDA out of memory. (not really)")

    model.register_forward_pre_hook(too_large, with_kwargs=True)
    args = toys.always_on(
        tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, max_steps=4, logging_steps=1
    )
    trainer = watch(model, args, digits.select(range(128)))
    assert trainer.state.train_batch_size == 8
    entries = losses(trainer)
    assert [entry["importance/active_share"] for entry in entries] == [0, 1, 1, 1]
    assert entries[-1]["importance/examples_scored"] == 3 * 24
    assert model.training


def test_a_batch_size_too_small_for_the_threshold_is_said(tmp_path, digits, caplog):
    model = toys.vit()

    def too_large(module, args, kwargs):
        if len(kwargs["pixel_values"]) > 4:
            raise RuntimeError("CUDA out of memory. (not really)")

    model.register_forward_pre_hook(too_large, with_kwargs=True)
    args = toys.arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=2)
    with caplog.at_level("WARNING", "hf_importance"):
        trainer = toys.run(Watched, model, args, digits.select(range(64)))
    assert trainer.state.train_batch_size == 4
    assert any("will stay off" in record.getMessage() for record in caplog.records)


# ---- Order and loading of the data ----


@pytest.mark.parametrize(
    "strategy", ["random", "group_by_length", pytest.param("batch_rebalance", marks=toys.since("5.17"))]
)
def test_sampling_strategies_give_the_own_batches_of_the_plain_trainer(tmp_path, strategy):
    tok = tokenizer()
    data = classified(tok)
    args = lambda: toys.always_on(  # noqa: E731
        tmp_path, train_sampling_strategy=strategy, gradient_accumulation_steps=2, max_steps=5, logging_steps=1
    )
    trainer = check_own_batches(lambda: toys.bert(pad_token_id=45), args, data, processing_class=tok)
    # Of what is kept of a step the long texts come in the small batches.
    trained, own = (
        [sorted(sizes(found)[i : i + 2]) for i in range(0, 10, 2)] for found in (trainer.trained, trainer.own_batches)
    )
    assert trained == own
    assert len(weighted(trainer)) == 8
    if strategy == "batch_rebalance":
        assert len(set(sizes(trainer.trained))) > 1  # long texts come in smaller micro-batches
        assert sizes(trainer.trained)[0] + sizes(trainer.trained)[1] == 32


def test_a_given_order_is_kept_and_a_warning_says_that_nothing_is_drawn(tmp_path, caplog):
    data = toys.sentences(96)
    args = toys.always_on(tmp_path, train_sampling_strategy="sequential", max_steps=6)
    order = "the loader reads the examples in an order, which others drawn in between would break"
    toys.check_off(caplog, order, lambda: toys.bert(dropout=0.1), args, data)
    trainer = toys.run(Watched, toys.bert(), args, data)
    assert torch.equal(torch.cat([batch["labels"] for batch in trainer.trained]), data[:]["labels"])


@toys.since("5.17")
def test_a_micro_batch_of_one_long_text_is_no_packed_one(tmp_path):
    tok = tokenizer()
    rows = [{"input_ids": [i % 40] * (3 if i % 8 else 300), "labels": i % 4} for i in range(64)]
    args = toys.always_on(
        tmp_path,
        train_sampling_strategy="batch_rebalance",
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
    )
    trainer = watch(toys.bert(pad_token_id=45), args, Dataset.from_list(rows), processing_class=tok)
    assert sizes(trainer.trained)[0] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"split_batches": True},
        {"use_seedable_sampler": False},
        {"dispatch_batches": True},
        {"even_batches": False},
        {"non_blocking": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_accelerator_config_in_one_process(tmp_path, digits, settings):
    args = lambda: toys.always_on(  # noqa: E731
        tmp_path, accelerator_config=settings, max_steps=8, logging_steps=1
    )
    trainer = check_own_batches(toys.vit, args, digits.select(range(100)))
    assert sizes(trainer.trained) == [16] * 6 + [4, 16]


@pytest.mark.filterwarnings(WORKERS_END)
def test_workers_and_pinned_memory_change_nothing(tmp_path, digits):
    ends = []
    for settings in (
        {},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"dataloader_pin_memory": True},
    ):
        # Four steps an epoch: the workers live on into the second.
        args = toys.always_on(tmp_path, max_steps=6, **settings)
        trainer = watch(toys.vit(), args, digits.select(range(64)))
        ends.append(parameters(trainer))
        workers = trainer.callback_handler.train_dataloader.base_dataloader._iterator
        assert (workers is not None) is ("dataloader_persistent_workers" in settings)
        if workers is not None:
            workers._shutdown_workers()  # left to the garbage collector, each would be waited for 5 s
    for end in ends[1:]:
        assert torch.equal(end, ends[0])


@pytest.mark.parametrize("remove", [True, False])
def test_unused_columns(tmp_path, remove):
    data = toys.sentences()
    data = data.add_column("note", [f"row {i}" for i in range(len(data))])
    data = data.add_column("extra", list(range(len(data)))).with_format("torch")
    model = toys.bert()
    if not remove:
        # What the model does not take, the user's own model leaves out.
        forward = model.forward
        model.forward = lambda extra=None, **inputs: forward(**inputs)
    trainer = watch(model, toys.always_on(tmp_path, remove_unused_columns=remove), data)
    batch = weighted(trainer)[-1]
    assert ("extra" in batch) is not remove
    assert "note" not in batch
    if not remove:
        rows = data.with_format("torch")[batch["extra"].tolist()]
        assert torch.equal(rows["input_ids"], batch["input_ids"])  # every entry of a row stays with its row


class Nested(torch.nn.Module):
    """A classifier that takes its pixels in a nested dict and ignores the rest."""

    loss_type = "ForImageClassification"

    def __init__(self):
        super().__init__()
        self.inner = toys.vit()
        self.config = self.inner.config

    def forward(self, image, labels=None, **ignored):
        return self.inner(pixel_values=image["views"][0] * image["scale"].view(-1, 1, 1, 1), labels=labels)


def test_nested_dicts_lists_and_entries_that_are_no_tensors(tmp_path, digits):
    def collate(examples):
        batch = default_data_collator(examples)
        pixels = batch["pixel_values"]
        return {
            "image": {"views": (pixels, pixels.flip(-1)), "scale": torch.ones(len(pixels))},
            "labels": batch["labels"],
            "names": [f"digit {int(label)}" for label in batch["labels"]],
            "source": "scikit-learn",
            "version": 3,
            "nothing": None,
        }

    args = toys.always_on(tmp_path, remove_unused_columns=False)
    trainer = watch(Nested(), args, digits.select(range(128)), data_collator=collate)
    for batch in weighted(trainer):
        assert len(batch["labels"]) == 16
        assert batch["names"] == [f"digit {int(label)}" for label in batch["labels"]]
        assert torch.equal(batch["image"]["views"][0].flip(-1), batch["image"]["views"][1])
        assert (batch["source"], batch["version"], batch["nothing"]) == ("scikit-learn", 3, None)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[i] for i in range(len(self.data))])


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_streams(tmp_path, digits, kind):
    data = digits.select(range(16 * 10))
    stream = Stream(data) if kind == "torch" else data.to_iterable_dataset()
    trainer = watch(toys.vit(), toys.always_on(tmp_path, max_steps=4, logging_steps=1), stream)
    # Step 1 takes one batch of the stream; 2 to 4 take three each: ten in all.
    assert trainer.state.global_step == 4
    entry = losses(trainer)[-1]
    assert entry["importance/examples_scored"] == 3 * 48
    assert sizes(trainer.trained) == [16] * 4
    own = torch.cat([batch["labels"] for batch in trainer.own_batches])
    taken = torch.cat([data[start : start + 16]["labels"] for start in (0, 16, 64, 112)])
    assert torch.equal(own, taken)


def test_a_stream_with_accumulation(tmp_path, digits):
    data = digits.select(range(16 * 14))
    args = toys.always_on(tmp_path, max_steps=3, logging_steps=1, gradient_accumulation_steps=2)
    trainer = watch(toys.vit(), args, data.to_iterable_dataset())
    # Two batches; then twice two own ones and a reserve of four.
    own = [batch["labels"] for batch in trainer.own_batches]
    assert len(own) == 6
    for labels, first in zip(own, (0, 1, 2, 3, 8, 9), strict=True):
        assert torch.equal(labels, data[16 * first : 16 * first + 16]["labels"])
    assert losses(trainer)[-1]["importance/examples_scored"] == 2 * 2 * 48


def test_a_stream_that_ends_within_a_pool_goes_on_with_the_next_epoch(tmp_path, digits):
    stream = digits.select(range(16 * 5)).to_iterable_dataset()
    trainer = watch(toys.vit(), toys.always_on(tmp_path, max_steps=6, logging_steps=1), stream)
    assert trainer.state.global_step == 6
    assert sizes(trainer.trained) == [16] * 6


# ---- Padding ----


def padding_is_right(batch, side, pad=45):
    """Every row is real tokens without a hole, then (or before) the tokenizer's own padding, and masked there."""
    mask = batch["attention_mask"].bool()
    steps = mask.long().diff(dim=1)
    assert ((steps <= 0) if side == "right" else (steps >= 0)).all()
    # A language model's collator may put any token in place of one that is to be predicted.
    read = batch["labels"] != -100 if batch["labels"].shape == mask.shape else torch.zeros_like(mask)
    assert torch.equal((batch["input_ids"] == pad) & ~(read & mask), ~mask)


@pytest.mark.parametrize("given", ["processing_class", "collator"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_dynamic_padding_is_the_tokenizers(tmp_path, side, given):
    tok = tokenizer(side)
    extra = (
        {"processing_class": tok} if given == "processing_class" else {"data_collator": DataCollatorWithPadding(tok)}
    )
    trainer = watch(toys.bert(pad_token_id=45), toys.always_on(tmp_path), classified(tok), **extra)
    rows = {tuple(row["input_ids"]): row["labels"] for row in classified(tok)}
    assert len({batch["input_ids"].shape[1] for batch in trainer.own_batches}) > 1
    for batch in weighted(trainer):
        padding_is_right(batch, side)
        for tokens, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert rows[tuple(tokens[mask.bool()].tolist())] == int(label)


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_labels_are_padded_with_the_tokens(tmp_path, side):
    tok = tokenizer(side)
    tags = [[token % 4 for token in row] for row in tokenised(tok)["input_ids"]]
    collator = DataCollatorForTokenClassification(tok)
    model = small(BertForTokenClassification, BertConfig, num_labels=4)
    trainer = watch(model, toys.always_on(tmp_path), tokenised(tok, labels=tags), data_collator=collator)
    for batch in weighted(trainer):
        padding_is_right(batch, side)
        real = batch["labels"] != -100
        assert torch.equal(real, batch["attention_mask"].bool())
        assert torch.equal(batch["labels"][real], batch["input_ids"][real] % 4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mlm", [True, False])
def test_language_modelling(tmp_path, side, mlm):
    tok = tokenizer(side)
    model = small(BertForMaskedLM, BertConfig) if mlm else llama()
    collator = DataCollatorForLanguageModeling(tok, mlm=mlm, mlm_probability=0.3)
    args = toys.always_on(tmp_path, logging_steps=1)
    trainer = watch(model, args, tokenised(tok), data_collator=collator, processing_class=tok)
    share = []
    for batch in weighted(trainer):
        padding_is_right(batch, side)
        read, mask = batch["labels"] != -100, batch["attention_mask"].bool()
        assert not (read & ~mask).any()
        if not mlm:  # no causal model predicts a row's first token, and padding put before it does not change that
            read |= mask & (mask.cumsum(1) == 1)
        share.append(float(read.sum() / mask.sum()))
        assert len({b["input_ids"].shape[1] for b in trainer.own_batches}) > 1
        unchanged = batch["input_ids"] == batch["labels"]
        assert (
            unchanged[batch["labels"] != -100].all()
            if not mlm
            else (batch["input_ids"][read] == tok.mask_token_id).any()
        )
    assert np.mean(share) == (pytest.approx(0.3, abs=0.1) if mlm else 1)
    assert losses(trainer)[1]["loss"] == pytest.approx(math.log(46), rel=0.15)


@pytest.mark.parametrize("side", ["right", "left"])
def test_merging_rows_leaves_their_losses_alone(tmp_path, side):
    tok = tokenizer(side)
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    trainer = Watched(
        model=llama(), args=toys.always_on(tmp_path), train_dataset=tokenised(tok), data_collator=collator
    )
    rows = sorted(tokenised(tok), key=lambda row: len(row["input_ids"]))
    narrow, wide = collator(rows[:3]), collator(rows[-3:])
    trainer.train()
    merged, _ = PooledBatches([narrow, wide], trainer._run.feed.padding).take(torch.arange(6))
    padding_is_right(merged, side)
    head, model = trainer._objective.head, trainer.model.eval()
    with torch.no_grad():
        found, *apart = (head.losses(model(**head.model_inputs(b)), b) for b in (merged, narrow, wide))
    torch.testing.assert_close(found, torch.cat(apart), rtol=1e-4, atol=1e-4)
    assert head.items(merged) == head.items(narrow) + head.items(wide)


@pytest.mark.parametrize("model_given", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_to_sequence(tmp_path, side, model_given):
    tok = tokenizer(side)
    model = t5()
    collator = DataCollatorForSeq2Seq(tok, model=model if model_given else None)
    data = tokenised(tok, labels=[row[::-1][: 2 + len(row) // 2] for row in tokenised(tok)["input_ids"]])
    trainer = watch(model, toys.always_on(tmp_path, logging_steps=1), data, data_collator=collator)
    for batch in weighted(trainer):
        padding_is_right(batch, side)
        if model_given:
            made = model.prepare_decoder_input_ids_from_labels(batch["labels"])
            read = batch["labels"] != -100
            assert torch.equal(batch["decoder_input_ids"][read], made[read])
            if side == "left":  # behind the last label it does not matter
                assert torch.equal(batch["decoder_input_ids"], made)


# ---- Counting, smoothing, clipping, optimizers ----


@pytest.mark.parametrize("how", ["all", "non_padding"])
def test_tokens_seen_are_those_trained_on(tmp_path, how):
    tok = tokenizer()
    args = toys.always_on(tmp_path, include_num_input_tokens_seen=how, logging_steps=4)
    trainer = watch(toys.bert(pad_token_id=45), args, classified(tok), processing_class=tok)
    count = lambda b: b["input_ids"].numel() if how == "all" else int(b["attention_mask"].sum())  # noqa: E731
    assert trainer.state.num_input_tokens_seen == sum(map(count, trainer.trained))
    entry = losses(trainer)[-1]
    assert entry["num_input_tokens_seen"] == trainer.state.num_input_tokens_seen
    assert entry["importance/examples_scored"] == 7 * 48
    assert entry["importance/examples_trained"] == 8 * 16


def test_label_smoothing_is_in_the_weighted_loss(tmp_path):
    model = toys.bert()
    args = toys.always_on(tmp_path, label_smoothing_factor=0.2, learning_rate=1e-9, max_steps=2, logging_steps=1)
    trainer = watch(model, args, toys.sentences())
    batch = weighted(trainer)[0]
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2, reduction="none")
    assert losses(trainer)[1]["loss"] == pytest.approx(float((batch[WEIGHTS] * each).mean()), rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_clipping(tmp_path, digits, clip):
    # With plain gradient descent a step is the learning rate times the clipped gradient.
    moves = []

    class Move(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            moves.append(parameters(model))

    args = toys.always_on(
        tmp_path, max_grad_norm=clip, optim="sgd", lr_scheduler_type="constant", max_steps=4, logging_steps=1
    )
    trainer = watch(toys.vit(), args, digits.select(range(128)), callbacks=[Move()])
    for step in (1, 2, 3):
        norm = losses(trainer)[step]["grad_norm"]
        length = float((moves[step] - moves[step - 1]).norm()) / args.learning_rate
        assert norm > 0.01
        assert length == pytest.approx(norm if clip == 0 else 0.01, rel=2e-2)


def test_optimizers_passed_in_are_used(tmp_path, digits):
    model = toys.vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    args = toys.always_on(tmp_path, logging_steps=1, max_steps=4)
    trainer = watch(model, args, digits.select(range(128)), optimizers=(optimizer, scheduler))
    assert [entry["learning_rate"] for entry in losses(trainer)] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


# ---- Evaluation, checkpoints, callbacks ----


class Snapshots(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        self.found.append(({k: v.clone() for k, v in model.state_dict().items()}, metrics["eval_loss"]))


def test_evaluation_and_prediction_are_the_plain_trainers(tmp_path, digits):
    snapshots, held_out = Snapshots(), digits.select(range(200, 250))
    args = toys.always_on(tmp_path, eval_strategy="steps", eval_steps=3, eval_on_start=True, logging_steps=1)
    extra = {"eval_dataset": held_out, "compute_metrics": lambda p: {"right": (p[0].argmax(-1) == p[1]).mean()}}
    trainer = watch(toys.vit(dropout=0.1), args, digits.select(range(128)), callbacks=[snapshots], **extra)
    assert len(snapshots.found) == 4  # at 0, 3, 6, and the end
    assert trainer.state.log_history[0]["step"] == 0  # eval_on_start
    assert "eval_right" in trainer.state.log_history[0]
    plain = Trainer(model=toys.vit(dropout=0.1), args=args, **extra)
    for weights, loss in snapshots.found:
        plain.model.load_state_dict(weights)
        assert plain.evaluate()["eval_loss"] == loss
    plain.model.load_state_dict(trainer.model.state_dict())
    timeless = lambda metrics: {k: v for k, v in toys.own(metrics).items() if k != "epoch" and "_time" not in k}  # noqa: E731
    assert timeless(trainer.evaluate()) == timeless(plain.evaluate())
    ours, theirs = trainer.predict(held_out), plain.predict(held_out)
    assert np.array_equal(ours.predictions, theirs.predictions)
    assert timeless(ours.metrics) == timeless(theirs.metrics)


def test_evaluation_leaves_training_as_it_was(tmp_path, digits):
    ends = [
        parameters(
            watch(
                toys.vit(),
                toys.always_on(tmp_path, max_steps=6, **evaluation),
                digits.select(range(128)),
                eval_dataset=digits.select(range(40)),
            )
        )
        for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1})
    ]
    assert torch.equal(*ends)


def test_best_model_early_stopping_and_a_limit_on_checkpoints(tmp_path):
    data = toys.sentences()
    args = toys.always_on(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=40,
        load_best_model_at_end=True,
        metric_for_best_model="worse",
        greater_is_better=True,
        save_total_limit=2,
        save_only_model=False,
    )
    falling = iter([1.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    snapshots = Snapshots()
    trainer = watch(
        toys.bert(),
        args,
        data,
        eval_dataset=data.select(range(20)),
        compute_metrics=lambda p: {"worse": next(falling)},
        callbacks=[EarlyStoppingCallback(2), snapshots],
    )
    assert trainer.state.global_step == 8  # best at 4, then two worse ones
    assert trainer.state.best_metric == 3.0
    assert torch.equal(
        parameters(trainer),
        torch.cat([snapshots.found[1][0][n].flatten() for n, _ in trainer.model.named_parameters()]),
    )
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint")) == [
        "checkpoint-4",
        "checkpoint-8",
    ]


class Director(TrainerCallback):
    """Asks for logs, evaluations, checkpoints and an end, as callbacks may."""

    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.trainer.log({"mine": float(step)})
        control.should_log = step in (2, 5)
        control.should_evaluate = step == 3
        control.should_save = step == 4
        control.should_training_stop = step == 6


def test_callbacks_that_log_evaluate_save_and_stop(tmp_path):
    args = toys.always_on(tmp_path, max_steps=100, logging_strategy="no")
    director = Director()
    trainer = Watched(
        model=toys.bert(),
        args=args,
        train_dataset=toys.sentences(),
        eval_dataset=toys.sentences(8),
        callbacks=[director],
    )
    director.trainer = trainer
    trainer.train()
    check_on(trainer)
    assert trainer.state.global_step == 6
    history = trainer.state.log_history
    assert [entry["mine"] for entry in history if "mine" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in losses(trainer)] == [2, 5]
    assert [entry["importance/active_share"] for entry in losses(trainer)] == [0.5, 1.0]
    assert losses(trainer)[-1]["importance/examples_trained"] == 5 * 16
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3]
    assert os.path.exists(tmp_path / "checkpoint-4")


def test_a_callback_that_ends_each_epoch_early(tmp_path, digits):
    class Short(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 3 == 0

    args = toys.always_on(tmp_path, max_steps=-1, num_train_epochs=2, logging_steps=1)
    trainer = watch(toys.vit(), args, digits.select(range(128)), callbacks=[Short()])
    assert trainer.state.global_step == 6
    assert len(weighted(trainer)) == 5


# ---- Several runs of one trainer ----


def test_several_calls_of_train_go_on_with_the_model(tmp_path, digits):
    trainer = watch(toys.vit(), toys.always_on(tmp_path, max_steps=4, logging_steps=1), digits.select(range(128)))
    first, trainer.trained = parameters(trainer), []
    trainer.train()
    check_on(trainer)
    assert not torch.equal(first, parameters(trainer))
    assert [entry["importance/active_share"] for entry in losses(trainer)] == [0, 1, 1, 1]


def test_model_init_gives_the_same_run_twice(tmp_path, digits):
    args = toys.always_on(tmp_path, max_steps=4, logging_steps=1)
    trainer = watch(None, args, digits.select(range(128)), model_init=lambda: toys.vit(dropout=0.1))
    first, trainer.trained = parameters(trainer), []
    trainer.train()
    check_on(trainer)
    assert torch.equal(first, parameters(trainer))
    once = toys.run(Watched, None, args, digits.select(range(128)), model_init=lambda: toys.vit(dropout=0.1))
    assert torch.equal(first, parameters(once))


def test_model_init_and_the_statistics_of_batch_norm(tmp_path, digits):
    # No step normalises by its batch, or moves the running statistics, in the very model that is trained.
    seen = []

    class Look(Watched):
        def compute_loss(self, model, inputs, *args, **kwargs):
            result = super().compute_loss(model, inputs, *args, **kwargs)
            layers = [m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            seen.append({(layer.training, int(layer.num_batches_tracked)) for layer in layers})
            return result

    args = toys.always_on(tmp_path, batch_norm="frozen", max_steps=3, logging_steps=1)
    watch(None, args, digits.select(range(128)), kind=Look, model_init=lambda: toys.resnet())
    assert seen == [{(False, 0)}] * 3


def test_hyperparameter_search(tmp_path, digits):
    pytest.importorskip("optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen = []

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            entries = [entry for entry in state.log_history if "loss" in entry]
            seen.append(
                (
                    args.per_device_train_batch_size,
                    entries[-1]["importance/tau_threshold"],
                    entries[-1]["importance/examples_trained"],
                    entries[-1]["importance/active_share"],
                )
            )

    trainer = Watched(
        args=toys.always_on(tmp_path, max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=3),
        train_dataset=digits.select(range(128)),
        eval_dataset=digits.select(range(20)),
        model_init=lambda: toys.vit(),
        compute_score_func=lambda outputs, labels: 1.0 + labels,
        callbacks=[Look()],
    )
    chosen = [(8, 1.001), (16, 1.002)]

    def space(trial):
        size, threshold = chosen[trial.number]
        return {
            "per_device_train_batch_size": trial.suggest_int("per_device_train_batch_size", size, size),
            "tau_threshold": trial.suggest_float("tau_threshold", threshold, threshold),
        }

    best = trainer.hyperparameter_search(space, n_trials=2, backend="optuna", direction="minimize")
    assert best.run_id in ("0", "1")
    assert seen == [(size, threshold, 3 * size, 1.0) for size, threshold in chosen]
