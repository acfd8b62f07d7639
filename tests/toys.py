"""Tiny real models and the pieces of a run that the trainer tests share."""

import logging
import random
import re
from importlib import metadata

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from packaging.version import Version
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.batches.entries import INDEX, WEIGHTS
from hf_importance.objective.scorer import Scorer
from hf_importance.testing.watched import leave_processes as leave_processes


def since(version: str, package: str = "transformers"):
    """Mark a test of what a package has from a version on."""
    older = Version(metadata.version(package)) < Version(version)
    return pytest.mark.skipif(older, reason=f"{package} has it from {version} on")


def vit(dropout: float = 0.0, seed: int = 0, **config) -> nn.Module:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 10,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return ViTForImageClassification(ViTConfig(**{**settings, **config}))


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    return ResNetForImageClassification(config)


def mobilenet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = MobileNetV2Config(num_channels=1, depth_multiplier=0.1, depth_divisible_by=4, num_labels=10)
    return MobileNetV2ForImageClassification(config)


def bert(dropout: float = 0.0, seed: int = 0, **config) -> nn.Module:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 4,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return BertForSequenceClassification(BertConfig(**{**settings, **config}))


def distilbert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=4, dropout=0.0, attention_dropout=0.0
    )
    return DistilBertForSequenceClassification(config)


def sentences(examples: int = 64, classes: int = 4, seed: int = 0, length: int = 6) -> Dataset:
    """Token sequences whose first token tells the class."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(10, 50, (examples, length))
    labels = generator.integers(0, classes, examples)
    tokens[:, 0] = labels
    return Dataset.from_dict(
        {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    ).with_format("torch")


def slow_but(quick, cases):
    """Mark the cases slow for which ``quick`` says no."""
    return [case if quick(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


class Augmented(torch.utils.data.Dataset):
    """Digits with random noise from all three global generators, as augmentation libraries draw it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        example = dict(self.dataset[index])
        noise = 0.01 * torch.randn(()) + 0.01 * np.random.rand() + 0.01 * random.random()
        example["pixel_values"] = example["pixel_values"] + noise
        return example


class Recorder(TrainerCallback):
    """Keeps the global random streams and the gradient norm after every step."""

    def __init__(self) -> None:
        self.streams = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.streams.append(
            (torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(), random.getstate()[1][-1])
        )
        self.streams.append(torch.rand(()).item())


# What goes to the sampler's constructor by importance_kwargs.
OF_THE_SAMPLER = (
    "margin", "share", "momentum", "resampling", "bias", "bias_until", "normalise", "calibrate", "kappa", "score",
)  # fmt: skip


def arguments(tmp_path, **overrides) -> ImportanceTrainingArguments:
    """Arguments of a short run; those in OF_THE_SAMPLER go into importance_kwargs."""
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 16,
        "max_steps": 8,
        "logging_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
        "importance_log": "all",
    }
    if overrides.get("importance_method", "presample") == "presample":
        # The paper's recipe: simple numbers, and on whatever the machine's speed.
        settings |= {"presample_ratio": 3.0, "tau_threshold": 2.0}
    more = {name: overrides.pop(name) for name in OF_THE_SAMPLER if name in overrides}
    if more:
        overrides["importance_kwargs"] = {**overrides.get("importance_kwargs", {}), **more}
    return ImportanceTrainingArguments(**{**settings, **overrides})


def run(kind: type[Trainer], model: nn.Module, args, dataset, **kwargs) -> Trainer:
    """Train and give the trainer back."""
    trainer = kind(model=model, args=args, train_dataset=dataset, **kwargs)
    trainer.train()
    return trainer


def always_on(tmp_path, **overrides) -> ImportanceTrainingArguments:
    """Arguments with which importance sampling is on from the second step on."""
    return arguments(tmp_path, **{"tau_threshold": 1.0 + 1e-9, "momentum": 0.0, **overrides})


def own(entry: dict) -> dict:
    """Take the timings and the keys of importance sampling out of a log entry."""
    return {
        name: value
        for name, value in entry.items()
        if not name.startswith("importance/") and not name.endswith(("_runtime", "_per_second", "step_time"))
    }


def score_pool(model, pool, head, score="upper_bound", size=None, **settings) -> torch.Tensor:
    """Score a pool with a scorer of its own."""
    return Scorer(lambda: model, head, score, **settings)(pool, size)


def given(trainer: Trainer) -> dict:
    """What ours belongs to the micro-batch that a training step is about to train on; the batch itself is without."""
    step = None if trainer._run is None else trainer._run.step
    return {} if step is None or step.begun >= len(step.micro) else _named(*step.micro[step.begun])


def handed(trainer: Trainer, batches: list) -> list[dict]:
    """The micro-batches of an optimizer step that ``get_batch_samples`` has just given, each with what ours it has."""
    step = None if trainer._run is None else trainer._run.step
    ours = step.micro if step is not None and step.micro else [(None, None)] * len(batches)
    return [{**batch, **_named(*one)} for batch, one in zip(batches, ours, strict=True)]


def _named(weights, index) -> dict:
    found = {WEIGHTS: weights, INDEX: index}
    return {name: value for name, value in found.items() if value is not None}


def gradient(parameters) -> torch.Tensor:
    """The gradient of an optimizer step, flat, zero where there is none.

    Up to transformers 5.4 its Trainer, the plain one too, has accelerate divide it by the micro-batches once more.
    """
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([each.flatten() for each in found]) * GradientState().num_steps


OFF = "Importance sampling is off for this run, which goes on as the plain Trainer's: "


def reason(caplog) -> str:
    """Why importance sampling is off: of the one warning that says so."""
    said = [record for record in caplog.records if record.getMessage().startswith(OFF)]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert not said[0].getMessage().endswith("..")
    return said[0].getMessage().removeprefix(OFF)


def check_off(caplog, expected: str, make_model, args, dataset, **kwargs) -> Trainer:
    """Train; it is the plain Trainer's run to the last bit, and one warning gives the expected reason."""
    ours = run(ImportanceTrainer, make_model(), args, dataset, **kwargs)
    found = reason(caplog)
    assert re.search(expected, found), found
    same_run(ours, run(Trainer, make_model(), args, dataset, **kwargs))
    return ours


def same_run(ours: Trainer, plain: Trainer) -> None:
    """Parameters and losses are the same to the last bit, NaN too."""
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    entries = [[own(entry) for entry in each.state.log_history if "loss" in entry] for each in (ours, plain)]
    assert repr(entries[0]) == repr(entries[1])
    scales = [getattr(each, "loss_is_scaled_for_ga", None) for each in (ours, plain)]  # from transformers 5.19 on
    assert scales[0] is scales[1]
