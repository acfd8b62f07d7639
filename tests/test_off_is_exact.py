"""While importance sampling is off the run is the plain Trainer's to the last bit: the plain Trainer is the oracle."""

import pytest
import torch
import toys
from transformers import Trainer, TrainingArguments

from hf_importance import Auto, History, ImportanceTrainer, Presample

NEVER = 3.99  # below sqrt(16), so it is a threshold that the arguments accept, and that these short runs never pass


def same_run(ours: Trainer, plain: Trainer, ours_streams, plain_streams) -> None:
    """Parameters, buffers, optimizer, log history and random streams, compared bit by bit."""
    for (name, one), (_, other) in zip(ours.model.state_dict().items(), plain.model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    one, other = ours.optimizer.state_dict(), plain.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index, state in one["state"].items():
        for name, value in state.items():
            if value is not None:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][index][name])), name
    entries = [toys.own(entry) for entry in ours.state.log_history]
    assert [e for e in entries if set(e) - {"epoch", "step"}] == [toys.own(e) for e in plain.state.log_history]
    assert ours_streams == plain_streams
    assert len(plain_streams) == 2 * plain.state.global_step


def compare(tmp_path, make_model, dataset, eval_dataset=None, **overrides) -> ImportanceTrainer:
    """Run both with the same arguments; give ours."""
    trainers, streams = [], []
    for kind in (ImportanceTrainer, Trainer):
        recorder = toys.Recorder()
        args = toys.arguments(tmp_path, tau_threshold=NEVER, **overrides)
        trainers.append(toys.run(kind, make_model(), args, dataset, eval_dataset=eval_dataset, callbacks=[recorder]))
        streams.append(recorder.streams)
    same_run(*trainers, *streams)
    return trainers[0]


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_vision(tmp_path, digits, dropout, optim, sampling):
    trainer = compare(
        tmp_path, lambda: toys.vit(dropout), digits.select(range(100)), optim=optim, importance_sampling=sampling
    )
    assert sampling == any("importance/tau" in entry for entry in trainer.state.log_history)
    assert not any(entry.get("importance/active") for entry in trainer.state.log_history)


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("make_model", [toys.bert, toys.distilbert])
def test_text_with_a_smaller_last_batch(tmp_path, make_model, sampling):
    compare(tmp_path, make_model, toys.sentences(57), num_train_epochs=2, max_steps=-1, importance_sampling=sampling)


@pytest.mark.parametrize("make_model", [toys.resnet, toys.mobilenet])
def test_batch_norm_statistics_too(tmp_path, digits, make_model):
    size = 8 if make_model is toys.resnet else 32
    data = digits.select(range(64)).map(
        lambda e: {"pixel_values": torch.nn.functional.interpolate(e["pixel_values"][None], size)[0]}
    )
    compare(tmp_path, make_model, data, max_steps=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_and_workers(tmp_path, digits, workers):
    data = toys.Augmented(digits.select(range(100)))
    compare(tmp_path, lambda: toys.vit(0.1), data, dataloader_num_workers=workers)


def test_evaluation_in_between(tmp_path, digits):
    trainer = compare(
        tmp_path,
        lambda: toys.vit(0.1),
        digits.select(range(100)),
        eval_dataset=digits.select(range(100, 140)),
        eval_strategy="steps",
        eval_steps=3,
    )
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3  # steps 3, 6 and the end


@pytest.mark.parametrize("make_model", [toys.vit, toys.bert])
def test_label_smoothing(tmp_path, digits, make_model):
    data = digits.select(range(100)) if make_model is toys.vit else toys.sentences()
    compare(tmp_path, make_model, data, label_smoothing_factor=0.1)


def test_a_head_that_honours_num_items_accumulates_as_the_plain_trainer_does(tmp_path, digits):
    # 100 = 6 * 16 + 4: the last step of an epoch has one micro-batch of 16 and one of 4.
    compare(tmp_path, toys.vit, digits.select(range(100)), gradient_accumulation_steps=3, max_steps=6)


def test_a_head_without_loss_arguments_accumulates_as_the_plain_trainer_does(tmp_path):
    def make_model():
        model = toys.bert()
        model.accepts_loss_kwargs = False  # the documented attribute
        return model

    compare(tmp_path, make_model, toys.sentences(96), gradient_accumulation_steps=3, max_steps=6)


def test_plain_training_arguments_get_the_defaults(tmp_path, digits):
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, per_device_train_batch_size=16,
    )  # fmt: skip
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(100)))
    given = trainer.importance_args
    assert (given.presample_ratio, given.ratio, given.threshold) == ("auto", None, None)
    assert trainer.sampler == Auto(Presample(budget="constant_variance"), History(budget="constant_variance"))
    assert trainer.state.global_step == 2
