"""One scale for the loss: however an optimizer step is cut into micro-batches, loss and gradient are the same."""

import math

import pytest
import torch
import toys
from datasets import Value
from transformers import Trainer

from hf_importance import ImportanceTrainer

LAYOUTS = [(8, 1), (4, 2), (2, 4)]  # per_device_train_batch_size, gradient_accumulation_steps


class FirstGradient(toys.TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradient = toys.gradient(model.parameters())


def first_step(kind, tmp_path, model, dataset, size, accumulation, **overrides):
    """Loss and gradient of one optimizer step."""
    callback = FirstGradient()
    args = toys.arguments(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0,
        **{"presample_ratio": 1.5, "tau_threshold": 1.2, **overrides},
    )
    trainer = toys.run(kind, model, args, dataset, callbacks=[callback])
    return next(e["loss"] for e in trainer.state.log_history if "loss" in e), callback.gradient


def weighted(dataset):
    """Give each example a weight of its own."""
    return dataset.add_column("importance_weights", [0.25 * (1 + i % 7) for i in range(len(dataset))])


HEADS = {
    "mean over the micro-batch": lambda: toys.bert(),
    "over the step": lambda: toys.vit(),
    "mean, no loss arguments": lambda: _without_loss_arguments(toys.bert()),
    "regression": lambda: toys.bert(num_labels=1),
    "label smoothing": lambda: toys.bert(),
}


def _without_loss_arguments(model):
    model.accepts_loss_kwargs = False
    return model


def data_for(name, digits, ragged):
    # Ragged: an epoch of 7, so the last micro-batch of the step is smaller. Else 8 of 24 make the step, the same ones.
    examples = 7 if ragged else 24
    data = digits.select(range(24)) if name == "over the step" else toys.sentences(24)
    if name == "regression":
        data = data.cast_column("labels", Value("float32"))
    return data.select(range(examples))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("phase", ["off", "disabled", "weighted"])
@pytest.mark.parametrize("name", HEADS)
def test_8x1_4x2_and_2x4_are_one_step(tmp_path, digits, name, phase, ragged):
    data = data_for(name, digits, ragged)
    settings = {"importance_sampling": phase == "off", "remove_unused_columns": phase != "weighted"}
    settings["label_smoothing_factor"] = 0.2 if name == "label smoothing" else 0.0
    if phase == "weighted":
        data = weighted(data)
    if ragged:
        settings["importance_sampling"] = False  # 7 examples are no pool; the path of the loss is the same
    found = [first_step(ImportanceTrainer, tmp_path, HEADS[name](), data, *layout, **settings) for layout in LAYOUTS]
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


def test_plain_trainer_is_wrong_here_and_ours_is_the_right_one(tmp_path):
    # The figures that README and docs quote: the same eight examples, in three layouts.
    data = toys.sentences(8)
    plain = [first_step(Trainer, tmp_path, toys.bert(), data, *layout)[0] for layout in LAYOUTS]
    ours = [
        first_step(ImportanceTrainer, tmp_path, toys.bert(), data, *layout, importance_sampling=False)[0]
        for layout in LAYOUTS
    ]
    assert plain == pytest.approx([plain[0], 2 * plain[0], 4 * plain[0]], rel=1e-4)
    assert ours == pytest.approx([plain[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("make_model", [toys.bert, toys.distilbert])
def test_a_presampled_step_has_the_scale_of_a_uniform_one(tmp_path, make_model):
    # Equal scores: every weight is 1, so an untrained model's loss is about ln 4, and not 2 or 4 times that.
    for size, accumulation in LAYOUTS:
        args = toys.always_on(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            presample_ratio=2.0,
            max_steps=4,
            logging_steps=4,
            learning_rate=0.0,
        )
        calls = []

        def alternate(outputs, labels, calls=calls):
            calls.append(len(labels))
            uneven = 1.0 + (torch.arange(len(labels)) % 2)
            return uneven if len(calls) <= accumulation else torch.ones(len(labels))  # noqa: B023

        trainer = toys.run(ImportanceTrainer, make_model(), args, toys.sentences(64), compute_score_func=alternate)
        entry = next(e for e in trainer.state.log_history if "loss" in e)
        assert entry["importance/active_share"] > 0
        assert entry["loss"] == pytest.approx(math.log(4), rel=0.1)


def test_weights_of_one_are_the_models_own_loss_and_gradient(tmp_path):
    trainer = ImportanceTrainer(model=toys.bert(), args=toys.arguments(tmp_path), train_dataset=toys.sentences())
    batch = toys.sentences()[:8]
    model = trainer.model.train()
    own = model(**batch).loss
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model, {**batch, "importance_weights": torch.ones(8)})
    loss.backward()
    torch.testing.assert_close(loss, own)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_plain_mean_is_the_plain_trainers(tmp_path, caplog, accumulation):
    class WithClassWeights(toys.BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, attention_mask)
            weight = torch.tensor([1.0, 5.0, 1.0, 1.0])
            found = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight, label_smoothing=0.1)
            outputs.loss = found * 1.5
            return outputs

    def model():
        torch.manual_seed(0)
        return WithClassWeights(toys.bert().config)

    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
    reason = r"the loss of the first batch is .*class weights.*importance_sampling=False"
    if accumulation == 1:  # class weights alone would be learnt
        reason = r"the loss is another than the model's head says \(its gradient .*importance_sampling=False"
    toys.check_off(caplog, reason, model, toys.arguments(tmp_path, **settings), toys.sentences())
    args = toys.arguments(tmp_path, importance_sampling=False, **settings)
    ours, plain = (toys.run(kind, model(), args, toys.sentences()) for kind in (ImportanceTrainer, Trainer))
    toys.same_run(ours, plain)


def test_the_scale_is_learnt_once_a_micro_batch_tells(tmp_path):
    # All items of the first step lie in its first micro-batch, so that one tells nothing, and a guess would be wrong
    # for one of the two models in the steps that follow.
    for make_model in (toys.bert, lambda: _step_scaled(toys.bert())):
        labels = [1, 2, -100, -100, *([0, 1, 2, 3] * 5)]
        data = toys.sentences(24).remove_columns("labels").add_column("labels", labels)
        losses = []
        for size, accumulation in ((2, 2), (4, 1)):
            args = toys.arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3,
                logging_steps=1, learning_rate=0.0, train_sampling_strategy="sequential", importance_sampling=False,
            )  # fmt: skip
            trainer = toys.run(ImportanceTrainer, make_model(), args, data)
            losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        assert losses[0][1:] == pytest.approx(losses[1][1:], rel=1e-5)


def _step_scaled(model):
    """Make BERT divide by the items of the step, as models with a loss function of transformers do."""
    own = model.forward

    def forward(input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        outputs = own(input_ids, attention_mask)
        summed = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        outputs.loss = summed / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return outputs

    model.forward = forward
    return model
