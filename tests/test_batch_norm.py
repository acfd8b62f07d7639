"""BatchNorm: its running statistics are left alone, or frozen; a batch keeps enough examples to normalise by."""

import logging

import torch
import toys
from torch import nn

from hf_importance import ImportanceTrainer
from hf_importance.objective.batch_norm import batch_norm_layers


def test_layers_without_running_statistics_are_left_out():
    without = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3), without, nn.LayerNorm(3), nn.GroupNorm(1, 3))
    assert batch_norm_layers(model) == [model[0]]
    assert len(batch_norm_layers(toys.resnet())) > 2
    assert batch_norm_layers(toys.vit()) == []


def train(tmp_path, digits, policy, **overrides):
    """Train a ResNet, importance sampling on from step 2, label 0 scored 50 times the others; give it and the data."""
    data = digits.select(range(256)).map(lambda e: {"pixel_values": e["pixel_values"] * (1 + 3 * (e["labels"] == 0))})
    model = toys.resnet()
    args = toys.always_on(tmp_path, batch_norm=policy, max_steps=40, learning_rate=0.0, **overrides)
    score = lambda outputs, labels: 1.0 + 49.0 * (labels == 0)  # noqa: E731
    trainer = toys.run(ImportanceTrainer, model, args, data, compute_score_func=score)
    return trainer.model, data


def first_layer_mean(model, data):
    """Mean of what reaches the first BatchNorm over the whole data set."""
    with torch.no_grad():
        return model.resnet.embedder.embedder.convolution(data["pixel_values"][:]).mean((0, 2, 3))


def test_left_alone_running_statistics_follow_the_hard_examples(tmp_path, digits):
    model, data = train(tmp_path, digits, "untouched")
    expected = first_layer_mean(model, data)
    found = model.resnet.embedder.embedder.normalization.running_mean
    assert float((found - expected).norm() / expected.norm()) > 0.2


def test_frozen_statistics_do_not_move(tmp_path, digits):
    model, _ = train(tmp_path, digits, "frozen")
    assert float(model.resnet.embedder.embedder.normalization.running_mean.norm()) == 0
    assert model.resnet.embedder.embedder.normalization.num_batches_tracked == 0


def test_with_frozen_statistics_a_gradient_does_not_depend_on_its_neighbours(tmp_path, digits):
    # Weights 1 and 0: the second example's pixels must not reach the first one's gradient.
    args = toys.arguments(tmp_path, batch_norm="frozen")
    trainer = ImportanceTrainer(toys.resnet(), args, train_dataset=digits)
    gradients = []
    for neighbour in (1, 2):
        model = trainer.model.train()
        model.zero_grad()
        batch = digits[[0, neighbour]]
        loss = trainer.compute_loss(model, {**batch, "importance_weights": torch.tensor([1.0, 0.0])})
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_choice_is_said_once_at_construction(tmp_path, digits, caplog):
    with caplog.at_level(logging.INFO, "hf_importance"):
        ImportanceTrainer(toys.resnet(), toys.arguments(tmp_path), train_dataset=digits)
        ImportanceTrainer(toys.vit(), toys.arguments(tmp_path), train_dataset=digits)
    assert [r.getMessage() for r in caplog.records] == [
        "ResNetForImageClassification has 8 BatchNorm layers: batch_norm='untouched', left alone, so that in "
        "importance steps the running statistics follow the hard examples."
    ]
