"""Bad arguments are refused before training, in words that name the argument, its value, and what to do.

What a model, a loss or a dataset is, is none: then importance sampling is off, and one warning says why.
"""

import logging

import pytest
import torch
import toys
from transformers import BertConfig, BertModel, Trainer

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("presample_ratio", 1.0, "presample_ratio must be a finite number above 1, or 'auto', but it is 1.0"),
        ("presample_ratio", float("inf"), "presample_ratio must be a finite number above 1, or 'auto', but it is inf"),
        ("presample_ratio", float("nan"), "presample_ratio must be a finite number above 1, or 'auto', but it is nan"),
        ("presample_ratio", "big", "presample_ratio must be a finite number above 1, or 'auto', but it is big"),
        ("tau_threshold", 1.0, "tau_threshold must be a finite number above 1, but it is 1.0"),
        ("tau_threshold", float("inf"), "tau_threshold must be a finite number above 1, but it is inf"),
        ("tau_threshold", "auto", "tau_threshold must be a finite number above 1, but it is auto"),
        ("importance_budget", "time", "'variance', 'constant_variance', 'constant_time', but it is 'time'"),
        ("scoring_dtype", "int8", "one of None, 'bf16', 'fp16', 'fp32', 'auto', but it is 'int8'"),
        ("scoring_batch_size", 0, "scoring_batch_size must be at least 1, but it is 0"),
        ("importance_score", "entropy", "importance_score must be one of 'upper_bound', 'loss', but it is 'entropy'"),
        ("importance_score", "gradient_norm", "one of 'upper_bound', 'loss', but it is 'gradient_norm'"),
        ("batch_norm", "eval", "batch_norm must be one of 'untouched', 'frozen', but it is 'eval'"),
        ("importance_kwargs", "{margin", r"importance_kwargs must be a dict or JSON of one, but it is '\{margin'"),
        ("importance_kwargs", [1], r"importance_kwargs must be a dict or JSON of one, but it is \[1\]"),
    ],
)
def test_an_argument_out_of_range(tmp_path, argument, value, message):
    with pytest.raises(ValueError, match=message):
        ImportanceTrainingArguments(output_dir=str(tmp_path), **{argument: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("margin", 0.9, "margin must be a finite number of at least 1, but it is 0.9"),
        ("momentum", 1.0, r"momentum must be a number in \[0, 1\), but it is 1.0"),
        ("momentum", -0.1, r"momentum must be a number in \[0, 1\), but it is -0.1"),
        ("momentum", float("nan"), r"momentum must be a number in \[0, 1\), but it is nan"),
        ("momentum", "much", r"momentum must be a number in \[0, 1\), but it is 'much'"),
        ("resampling", "poisson", "resampling must be one of 'systematic', 'multinomial', but it is 'poisson'"),
        ("bias", 2, r"bias must be a number in \[0, 1\], but it is 2"),
        ("kappa", 0.0, r"kappa must be a number in \(0, 1\], but it is 0.0"),
        ("score", "entropy", "score must be one of 'upper_bound', 'loss', 'gradient_norm', but it is 'entropy'"),
        ("budget", "time", "'variance', 'constant_variance', 'constant_time', but it is 'time'"),
        ("shares", 0.1, "importance_kwargs has 'shares', which importance_method='auto' does not know. It knows"),
    ],
)
def test_a_setting_of_the_method_out_of_range(tmp_path, name, value, message):
    args = ImportanceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, importance_kwargs={name: value})
    with pytest.raises(ValueError, match=message):
        ImportanceTrainer(toys.bert(), args)


def test_a_threshold_that_tau_can_never_pass(tmp_path, digits):
    # Off, tau is measured on 4 * 2 = 8 examples and cannot pass sqrt(8) = 2.83.
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(
        ValueError, match=r"8 examples of one optimizer step .* cannot pass 2.83, .* tau_threshold of 3 "
    ):
        ImportanceTrainer(toys.vit(), toys.arguments(tmp_path, tau_threshold=3.0, **settings), train_dataset=digits)
    ImportanceTrainer(toys.vit(), toys.arguments(tmp_path, tau_threshold=2.8, **settings), train_dataset=digits)


def test_a_step_of_one_example_warns_once_and_trains(tmp_path, digits, caplog):
    args = ImportanceTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=2, use_cpu=True, report_to="none"
    )
    with caplog.at_level(logging.WARNING, "hf_importance"):
        toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(32)))
    messages = [r.getMessage() for r in caplog.records if "stay off" in r.getMessage()]
    assert len(messages) == 1
    assert "1 says nothing. What to do: raise per_device_train_batch_size" in messages[0]


def test_a_model_whose_loss_is_not_known_to_split(tmp_path, digits, caplog):
    class Contrastive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(64, 4)

        def forward(self, pixel_values, labels=None):
            z = self.layer(pixel_values.flatten(1))
            return {"loss": (z @ z.T).square().mean(), "logits": z}

    # Accumulation too is the plain Trainer's where the head is not known.
    settings, small = {"gradient_accumulation_steps": 2}, digits.select(range(64))
    what_to_do = "how that of Contrastive splits.*compute_example_losses=.*importance_sampling=False"
    toys.check_off(caplog, what_to_do, Contrastive, toys.arguments(tmp_path, **settings), small)
    caplog.clear()
    args = toys.arguments(tmp_path, importance_sampling=False, **settings)
    ours, plain = (toys.run(kind, Contrastive(), args, small) for kind in (ImportanceTrainer, Trainer))
    toys.same_run(ours, plain)
    assert not caplog.records


def same_error(tmp_path, make_model, data):
    """What training fails with, ours as the plain Trainer."""
    said = []
    for kind in (ImportanceTrainer, Trainer):
        with pytest.raises(ValueError) as error:
            toys.run(kind, make_model(), toys.arguments(tmp_path), data)
        said.append(str(error.value))
    assert said[0] == said[1]
    return said[0]


def test_a_body_without_a_head(tmp_path, caplog):
    config = BertConfig(hidden_size=16, num_attention_heads=2)
    assert "did not return a loss" in same_error(tmp_path, lambda: BertModel(config), toys.sentences())
    assert "how that of BertModel splits" in toys.reason(caplog)


def test_a_dataset_without_labels(tmp_path, caplog):
    data = toys.sentences().remove_columns("labels")
    assert "did not return a loss" in same_error(tmp_path, toys.bert, data)
    found = toys.reason(caplog)
    assert "no 'labels', only ['attention_mask', 'input_ids']" in found and "'label' or 'labels'" in found


def test_no_dataset_at_all(tmp_path, digits):
    assert "num_samples=0" in same_error(tmp_path, toys.vit, digits.select(range(0)))


@pytest.mark.parametrize("examples", [10, 47])
def test_a_dataset_too_small_for_a_pool(tmp_path, digits, examples, caplog):
    too_few = f"train_dataset has {examples} examples, fewer than the pool of 48 .*ratio=3 times a batch of 16"
    data = digits.select(range(examples))
    toys.check_off(caplog, too_few, lambda: toys.vit(dropout=0.1), toys.arguments(tmp_path), data)


def test_the_smallest_dataset_that_makes_a_pool_trains(tmp_path, digits):
    trainer = toys.run(ImportanceTrainer, toys.vit(), toys.always_on(tmp_path), digits.select(range(48)))
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("on", [False, True])
def test_a_batch_of_ignored_labels(tmp_path, on, caplog):
    data = toys.sentences(64).with_format(None).map(lambda e: {"labels": -100}).with_format("torch")
    args = (toys.always_on if on else toys.arguments)(tmp_path)
    toys.check_off(caplog, r"every label of a batch is ignored \(-100\).*Remove such examples", toys.bert, args, data)


def test_some_ignored_labels_are_trained_around(tmp_path):
    data = toys.sentences(64).with_format(None)
    data = data.map(lambda e, i: {"labels": -100 if i % 3 == 0 else e["labels"]}, with_indices=True)
    trainer = toys.run(ImportanceTrainer, toys.bert(), toys.always_on(tmp_path), data.with_format("torch"))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_score_function_of_the_wrong_shape(tmp_path, digits):
    args = toys.arguments(tmp_path)
    with pytest.raises(ValueError, match=r"one score an example, shape \(16,\), but it gave torch.Size\(\[\]\)"):
        toys.run(
            ImportanceTrainer,
            toys.vit(),
            args,
            digits.select(range(64)),
            compute_score_func=lambda o, y: torch.ones(()),
        )


def test_a_negative_score(tmp_path, digits):
    args = toys.always_on(tmp_path)
    with pytest.raises(ValueError, match=r"compute_score_func gave a score of -1: .* it cannot be negative\. Give"):
        toys.run(
            ImportanceTrainer,
            toys.vit(),
            args,
            digits.select(range(64)),
            compute_score_func=lambda o, y: torch.arange(len(y)) - 1.0,
        )


def mean_over_items(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def mean_over_micro_batch(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def pairwise(outputs, labels, num_items_in_batch=None):
    same = (labels[:, None] == labels).float()
    return (torch.cdist(outputs.logits, outputs.logits) * same).sum()


@pytest.mark.parametrize("function", [mean_over_items, mean_over_micro_batch])
def test_a_loss_function_that_splits_by_example_is_weighted(tmp_path, digits, function):
    trainer = toys.run(
        ImportanceTrainer, toys.vit(), toys.always_on(tmp_path), digits.select(range(64)), compute_loss_func=function
    )
    assert trainer.state.log_history[-2]["importance/active_share"] == 1
    batch = digits[:6]
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, 1.0])
    trainer._objective.step_items = None
    found = trainer.compute_loss(trainer.model, {**batch, "importance_weights": weights})
    logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    each = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(found, (weights * each).mean())


def test_a_loss_function_that_does_not_split(tmp_path, digits, caplog):
    args, data = toys.arguments(tmp_path), digits.select(range(64))
    no_sum = "its gradient at the logits points elsewhere"
    toys.check_off(caplog, no_sum, toys.vit, args, data, compute_loss_func=pairwise)


BOTH, AUTO = ("constant_variance", "constant_variance"), {"importance_method": "auto"}
FRESH = {"importance_method": "presample"}


@pytest.mark.parametrize(
    ("given", "ratio", "threshold", "budgets"),
    [
        ({}, None, None, BOTH),
        (FRESH, None, None, "constant_variance"),
        ({**FRESH, "presample_ratio": 3.0}, 3.0, None, "variance"),
        ({"presample_ratio": 3.0, "tau_threshold": 2.0}, 3.0, 2.0, "variance"),
        ({**FRESH, "importance_budget": "constant_time"}, None, None, "constant_time"),
        ({"importance_method": "history"}, None, None, "variance"),
        (AUTO, None, None, BOTH),
        ({"importance_method": "observe"}, None, None, BOTH),
        ({**AUTO, "presample_ratio": 3.0}, 3.0, None, ("variance", "variance")),
        # By memory a step costs what a uniform one does, whatever the noise.
        ({**AUTO, "importance_budget": "constant_time"}, None, None, ("constant_time", "variance")),
    ],
)
def test_what_is_left_out_follows_from_what_is_given(tmp_path, given, ratio, threshold, budgets):
    args = ImportanceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
    before = dict(vars(args))
    found = ImportanceTrainer(toys.bert(), args).sampler
    assert vars(args) == before  # a field holds what was given
    assert (args.ratio, args.threshold) == (ratio, threshold)
    assert (getattr(found, "ratio", ratio), getattr(found, "threshold", threshold)) == (ratio, threshold)
    parts = (found,) if isinstance(budgets, str) else (found.fresh, found.remembered)
    assert [part.budget for part in parts] == ([budgets] if isinstance(budgets, str) else list(budgets))
