"""The mixin around other trainers: Seq2SeqTrainer, models with PEFT adapters, and TRL's trainers."""

import json
from dataclasses import dataclass

import pytest
import test_features as features
import torch
import toys
from datasets import Dataset
from test_features import losses, parameters, weighted
from transformers import (
    DataCollatorForSeq2Seq,
    IntervalStrategy,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    set_seed,
)

from hf_importance import ImportanceArguments, ImportanceMixin, ImportanceTrainer
from hf_importance.batches.entries import WEIGHTS
from hf_importance.batches.pool import Padding, PooledBatches

# peft's and TRL's own: they still say gradient_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

ON = {"tau_threshold": 1 + 1e-9, "importance_kwargs": {"momentum": 0.0}, "importance_log": "all"}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}


# ---- Seq2SeqTrainer ----


@dataclass
class Seq2SeqArguments(ImportanceArguments, Seq2SeqTrainingArguments):
    """As docs/features.md has it."""


class ImportanceSeq2SeqTrainer(ImportanceMixin, Seq2SeqTrainer):
    """As docs/features.md has it."""


def test_combined_arguments_run_both_checks(tmp_path):
    args = Seq2SeqArguments(output_dir=str(tmp_path), eval_strategy="no", presample_ratio=2.0, **QUIET)
    assert args.eval_strategy is IntervalStrategy.NO  # TrainingArguments' own __post_init__ has run
    assert args.presample_ratio == 2
    with pytest.raises(ValueError, match="presample_ratio"):
        Seq2SeqArguments(output_dir=str(tmp_path), presample_ratio=0.5)
    with pytest.raises(ValueError, match="never"):
        Seq2SeqArguments(output_dir=str(tmp_path), eval_strategy="never")


class WatchedSeq2Seq(features.Watched, Seq2SeqTrainer):
    pass


def test_seq2seq_trainer_generates_while_it_evaluates(tmp_path):
    tok = features.tokenizer()
    data = features.tokenised(tok, labels=[row[: 1 + len(row) // 2] for row in features.tokenised(tok)["input_ids"]])
    generated = []

    def metrics(prediction):
        generated.append(prediction.predictions)
        return {"seen": len(prediction.predictions)}

    args = Seq2SeqArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=6,
        **ON,
        **QUIET,
    )
    model = features.t5()
    extra = {
        "data_collator": DataCollatorForSeq2Seq(tok, model=model),
        "processing_class": tok,
        "compute_metrics": metrics,
        "eval_dataset": data.select(range(10)),
    }
    trainer = features.watch(model, args, data, kind=WatchedSeq2Seq, **extra)
    assert [entry["importance/active_share"] for entry in losses(trainer)] == [0, 1, 1, 1]
    evaluations = [entry for entry in trainer.state.log_history if "eval_seen" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    assert len(generated) == 2
    for tokens in generated:  # not logits
        assert tokens.ndim == 2
        assert len(tokens) == 10
        assert tokens.dtype.kind == "i"
    plain = Seq2SeqTrainer(model=model, args=args, **extra)
    assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"] == evaluations[-1]["eval_loss"]


# ---- PEFT ----


def adapted(model, task, targets, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type=task, r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets, **settings)
    return peft.get_peft_model(model, config)


def adapted_bert():
    return adapted(toys.bert(), "SEQ_CLS", ["query", "value"])


def adapted_llama():
    return adapted(features.llama(), "CAUSAL_LM", ["q_proj", "v_proj"])


def sequences():
    tokens = torch.randint(0, 40, (96, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")


def adapted_t5():
    return adapted(features.t5(), "SEQ_2_SEQ_LM", ["q", "v"])


def adapted_tokens():
    model = features.small(features.BertForTokenClassification, features.BertConfig, num_labels=4)
    return adapted(model, "TOKEN_CLS", ["query", "value"])


def adapted_without_a_task():
    return adapted(toys.bert(), None, ["query", "value"])


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (adapted_bert, "ClassificationHead"),
        (adapted_llama, "TokenHead"),
        (adapted_t5, "SequenceToSequenceHead"),
        (adapted_tokens, "TokenHead"),
        (adapted_without_a_task, "ClassificationHead"),
    ],
)
def test_the_head_is_found_through_the_adapter(tmp_path, build, head):
    trainer = ImportanceTrainer(model=build(), args=toys.always_on(tmp_path), train_dataset=toys.sentences())
    assert type(trainer._objective.head).__name__ == head
    assert getattr(trainer._objective.head, "shift", False) is (build is adapted_llama)


PEFT = {"BERT": (adapted_bert, toys.sentences), "Llama": (adapted_llama, sequences)}


@pytest.mark.parametrize("name", PEFT)
def test_adapters_train_and_the_base_stays(tmp_path, name):
    build, data = PEFT[name]
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = features.watch(model, toys.always_on(tmp_path, max_steps=6), data())
    for parameter_name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == parameter.requires_grad, parameter_name
    assert len(weighted(trainer)) == 5


@pytest.mark.parametrize("name", PEFT)
def test_weights_of_one_give_the_adapted_models_own_loss(tmp_path, name):
    build, data = PEFT[name]
    trainer = ImportanceTrainer(model=build(), args=toys.arguments(tmp_path), train_dataset=data())
    batch = data()[:5]
    own = trainer.model(**batch).loss
    found = trainer.compute_loss(trainer.model, {**batch, WEIGHTS: torch.ones(5)})
    torch.testing.assert_close(found, own)


def test_gradient_norm_runs_over_the_adapters_only(tmp_path):
    model = adapted_bert()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # they start at 0, and lora_A would have no gradient
    trainer = ImportanceTrainer(model=model, args=toys.always_on(tmp_path), train_dataset=toys.sentences())
    batch = toys.sentences()[:4]
    pool = PooledBatches([batch], Padding())
    found = toys.score_pool(model, pool, trainer._objective.head, "gradient_norm")
    model.eval()
    for i in range(4):
        model.zero_grad()
        model(**{name: value[i : i + 1] for name, value in batch.items()}).loss.backward()
        gradients = {n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}
        assert all("lora" in n or "classifier" in n for n in gradients)
        assert float(found[i]) == pytest.approx(float(torch.cat(list(gradients.values())).norm()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")  # peft's own, offline
def test_adapters_resume_as_if_never_interrupted(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    run = lambda folder: toys.always_on(tmp_path / folder, **settings)  # noqa: E731
    whole = toys.run(ImportanceTrainer, adapted_bert(), run("whole"), toys.sentences())
    saved = json.loads((tmp_path / "whole/checkpoint-3/adapter_config.json").read_text())
    assert saved["r"] == 2
    resumed = ImportanceTrainer(model=adapted_bert(), args=run("resumed"), train_dataset=toys.sentences())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert torch.equal(parameters(whole), parameters(resumed))
    assert losses(whole)[-1]["importance/tau"] == losses(resumed)[-1]["importance/tau"]


# ---- TRL ----


OWN_WARNINGS = [  # TRL's own
    pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def sft(tmp_path, mixed=True, model=None, side="right", own=None, **overrides):
    trl = pytest.importorskip("trl")
    bases = (*((own,) if own else ()), *((ImportanceMixin,) if mixed else ()), trl.SFTTrainer)

    @dataclass
    class Arguments(*((ImportanceArguments,) if mixed else ()), trl.SFTConfig):
        pass

    class Trained(*bases):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            given = toys.handed(self, batches) if mixed else batches
            self.trained = [*getattr(self, "trained", []), *given]
            return batches, items

    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 32,
        **QUIET,
        **(ON if mixed else {}),
    }
    rows = Dataset.from_dict({"text": [text for text, _ in features.texts()]})
    set_seed(0)
    return Trained(
        model=features.llama() if model is None else model,
        args=Arguments(**{**settings, **overrides}),
        train_dataset=rows,
        eval_dataset=rows.select(range(10)),
        processing_class=features.tokenizer(side),
    )


def check_off(tmp_path, caplog, expected, **settings):
    """It is the plain SFTTrainer's run to the last bit, and one warning gives the expected reason."""
    trainers = [sft(tmp_path, mixed, **settings) for mixed in (True, False)]
    for trainer in trainers:
        trainer.train()
    assert expected in toys.reason(caplog)
    toys.same_run(*trainers)
    return trainers[0]


class TestSFT:
    pytestmark = OWN_WARNINGS

    def test_it_trains_on_weighted_examples(self, tmp_path):
        trainer = sft(tmp_path)
        before = parameters(trainer)
        trainer.train()
        features.check_on(trainer)
        assert not torch.equal(before, parameters(trainer))
        assert [entry["importance/active_share"] for entry in losses(trainer)] == [0, 1, 1, 1]
        for batch in weighted(trainer):
            features.padding_is_right(batch, "right")

    def test_off_it_is_the_plain_sft_trainer(self, tmp_path):
        ends = []
        for mixed, settings in ((False, {}), (True, {"importance_sampling": False})):
            trainer = sft(tmp_path, mixed, **settings)
            trainer.train()
            ends.append((parameters(trainer), [entry["loss"] for entry in losses(trainer)]))
        assert torch.equal(ends[0][0], ends[1][0])
        assert ends[0][1] == ends[1][1]

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("sampling", [False, True])
    def test_a_uniform_step_has_one_forward_pass(self, tmp_path, sampling, adapted):
        # Its fused head gives no logits: they are made of the hidden states of the same pass. How, one pass tells.
        model, calls = adapted_llama() if adapted else features.llama(), []
        trainer = sft(tmp_path, model=model, importance_sampling=sampling, tau_threshold=2.0, presample_ratio=3.0)
        model.get_decoder().register_forward_hook(lambda module, *_: calls.append(module.training))
        trainer.train()
        assert sum(calls) == 4 and len(calls) - sum(calls) == sampling
        if sampling:
            assert [entry["importance/active_share"] for entry in losses(trainer)] == [0] * 4
            assert all("importance/tau" in entry for entry in losses(trainer))

    def test_on_but_uniform_it_is_the_plain_sft_trainer_with_dropout_too(self, tmp_path):
        trainers = []
        for mixed, never in ((True, {"tau_threshold": 2.0, "presample_ratio": 3.0}), (False, {})):
            trainers.append(sft(tmp_path, mixed, features.llama(attention_dropout=0.3), max_steps=6, **never))
            trainers[-1].train()
        toys.same_run(*trainers)
        assert trainers[0]._run.watch.barred is None

    def test_logits_made_of_hidden_states_are_the_models_own(self, tmp_path):
        trainer = sft(tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.model.eval()
        own = model(**trainer._objective.head.model_inputs(batch)).logits
        _, outputs = trainer._objective.fused(super(ImportanceMixin, trainer).compute_loss, model, batch)
        torch.testing.assert_close(outputs.logits, own.detach())

    def test_a_tokenizer_that_pads_left(self, tmp_path):
        # TRL's collator pads on the right all the same; the loss of a drawn row is that of its text alone.
        trainer = sft(tmp_path, side="left", max_steps=8)
        features.padding_is_right(next(iter(trainer.get_train_dataloader())), "right")
        trainer.train()
        batch = weighted(trainer)[-1]
        model, head = trainer.model.eval(), trainer._objective.head
        together = head.losses(model(**head.model_inputs(batch)), batch).detach()
        for i, mask in enumerate(batch["attention_mask"].bool()):
            row = {name: batch[name][i : i + 1, mask] for name in ("input_ids", "attention_mask", "labels")}
            alone = head.losses(model(**head.model_inputs(row)), row)
            assert float(together[i]) == pytest.approx(float(alone.detach()), rel=1e-4)

    def test_packed_rows_are_examples(self, tmp_path):
        settings = {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 4}
        trainer = sft(tmp_path, **settings)
        trainer.train()
        assert [entry["importance/active_share"] for entry in losses(trainer)] == [0, 1, 1, 1]
        for batch in weighted(trainer):
            assert batch["input_ids"].shape == (4, 32)
            assert len(batch[WEIGHTS]) == 4

    def test_batches_without_padding_are_trained_on_as_they_are(self, tmp_path, caplog):
        trainer = check_off(tmp_path, caplog, "one row of 16 examples", padding_free=True, max_length=None)
        assert {len(batch["input_ids"]) for batch in trainer.trained} == {1}

    def test_weights_of_one_give_its_own_loss(self, tmp_path):
        trainer = sft(tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        own = trainer.compute_loss(trainer.model.eval(), dict(batch))
        found = trainer.compute_loss(trainer.model.train(), {**batch, WEIGHTS: torch.ones(16)})
        torch.testing.assert_close(found, own)

    def test_evaluation_is_its_own(self, tmp_path):
        trainer = sft(tmp_path)
        trainer.train()
        plain = sft(tmp_path, mixed=False, model=trainer.model)
        ours, theirs = trainer.evaluate(), plain.evaluate()
        for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
            assert ours[name] == theirs[name]

    def test_its_metrics_in_importance_steps(self, tmp_path):
        trainer = sft(tmp_path)
        trainer.train()
        # SFTTrainer measures these within its own loss, which importance steps do not call.
        measured = [entry for entry in trainer.state.log_history if "entropy" in entry]
        assert [entry["step"] for entry in measured] == [1]
        assert measured[0]["importance/active"] == 1 and "loss" in measured[0]
        assert measured[0]["num_tokens"] == int(trainer.trained[0]["attention_mask"].sum())

    def test_another_loss_than_the_mean_is_its_own(self, tmp_path, caplog):
        check_off(tmp_path, caplog, "losses of its examples", loss_type="dft")

    def test_a_loss_of_the_users_own_is_not_taken_for_its_own(self, tmp_path, caplog):
        class Own:
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs)

        check_off(tmp_path, caplog, "no function of the logits", own=Own)

    def test_importance_steps_are_held_against_its_loss_too(self, tmp_path, caplog):
        trainer = sft(tmp_path, max_steps=18, logging_steps=1)
        trainer.train()
        assert [entry["importance/active_share"] for entry in losses(trainer)] == [0, *[1] * 17]
        # One of 16 of them has a forward pass of its own loss, in which these are measured.
        assert [entry["step"] for entry in trainer.state.log_history if "entropy" in entry] == [1, 16]
        assert not any(record.getMessage().startswith(toys.OFF) for record in caplog.records)

    def test_with_adapters(self, tmp_path):
        model = adapted_llama()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer = sft(tmp_path, model=model)
        trainer.train()
        features.check_on(trainer)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def reward(completions, **_):
    return [float(len(text) % 7) for text in completions]


def prompts():
    return [text.split()[0] + " " for text, _ in features.texts()]


def texts(shift=0):
    found = [text for text, _ in features.texts()]
    return found[shift:] + found[:shift]


def liked():
    return [i % 2 == 0 for i in range(len(texts()))]


def scorer():
    return features.small(LlamaForSequenceClassification, features.LlamaConfig, num_labels=1)


def with_reference():
    return {"model": features.llama(), "ref_model": features.llama()}


def rewarded():
    return {"model": features.llama(), "reward_funcs": reward}


PAIRS = {"chosen": texts, "rejected": lambda: texts(3)}
GENERATES = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
# Each: what it is made of, columns of its data, arguments, and why importance sampling is off.
OTHERS = {
    "Reward": (lambda: {"model": scorer()}, PAIRS, {}, "no 'labels'"),
    "DPO": (with_reference, {"prompt": prompts, **PAIRS}, {"gradient_accumulation_steps": 2}, "no 'labels'"),
    "KTO": (with_reference, {"prompt": prompts, "completion": texts, "label": liked}, {}, "in an order"),
    "GRPO": (rewarded, {"prompt": prompts}, GENERATES, "RepeatSampler"),
    "RLOO": (rewarded, {"prompt": prompts}, {**GENERATES, "beta": 0.0}, "RepeatSampler"),
}


class TestOthersOfTRL:
    pytestmark = OWN_WARNINGS

    @pytest.mark.parametrize("method", ["presample", "history"])
    @pytest.mark.parametrize("name", OTHERS)
    def test_what_compares_or_generates_is_off(self, tmp_path, caplog, name, method):
        trl = pytest.importorskip("trl")
        own, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
        build, columns, needs, expected = OTHERS[name]
        data = Dataset.from_dict({column: values() for column, values in columns.items()})
        found = []
        for mixed in (True, False):

            @dataclass
            class Arguments(*((ImportanceArguments,) if mixed else ()), config):
                pass

            class Trained(*((ImportanceMixin,) if mixed else ()), own):
                pass

            settings = {"output_dir": str(tmp_path), "max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
            settings |= {"bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2, **QUIET, **needs}
            settings |= {"importance_method": method} if mixed else {}
            set_seed(0)
            given = {"args": Arguments(**settings), "train_dataset": data, "processing_class": features.tokenizer()}
            found.append(Trained(**build(), **given))
            found[-1].train()
        assert expected in toys.reason(caplog)
        toys.same_run(*found)

    def test_no_private_name_is_theirs(self):
        trl = pytest.importorskip("trl")
        ours = vars(ImportanceMixin).keys() - dir(Trainer)
        for name in dir(trl):
            if name.endswith("Trainer"):
                theirs = {entry for kind in getattr(trl, name).__mro__ for entry in vars(kind)}
                assert not ours & theirs, name
