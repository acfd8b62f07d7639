"""BatchNorm: the running statistics move by the pool as one training pass of it would move them."""

import logging

import pytest
import torch
import toys
from torch import nn

from hf_importance import ImportanceTrainer
from hf_importance.batch_norm import batch_norm_layers, follow_pool, normalise_weighted


@pytest.mark.parametrize("momentum", [0.1, 0.997, None])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (12, 5)),
        (nn.BatchNorm1d, (12, 5, 7)),
        (nn.BatchNorm2d, (12, 5, 4, 3)),
        (nn.SyncBatchNorm, (12, 5, 3)),
    ],
)
def test_one_pool_in_chunks_moves_the_statistics_as_one_training_pass(layer, shape, momentum, generator):
    ours, theirs = layer(5, momentum=momentum), nn.BatchNorm1d(5, momentum=momentum)
    if layer is nn.BatchNorm2d:
        theirs = nn.BatchNorm2d(5, momentum=momentum)
    for _ in range(3):
        pool = 2 + 3 * torch.randn(shape, generator=generator)
        theirs.train()(pool)
        ours.eval()
        with follow_pool([ours]):
            for chunk in pool.split(5):
                nn.functional.batch_norm(chunk, ours.running_mean, ours.running_var)
                if layer is nn.SyncBatchNorm:
                    for hook in ours._forward_pre_hooks.values():
                        hook(ours, (chunk,))  # the layer itself runs on accelerators only
                else:
                    ours(chunk)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    assert not ours._forward_pre_hooks


def test_inside_the_block_the_old_statistics_normalise(generator):
    layer = nn.BatchNorm1d(4).eval()
    pool = torch.randn(6, 4, generator=generator)
    before = layer(pool)
    with follow_pool([layer]):
        torch.testing.assert_close(layer(pool), before, rtol=0, atol=0)
    assert not torch.equal(layer(pool), before)


def test_layers_without_running_statistics_are_left_out():
    without = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3), without, nn.LayerNorm(3), nn.GroupNorm(1, 3))
    assert batch_norm_layers(model) == [model[0]]
    assert len(batch_norm_layers(toys.resnet())) > 2
    assert batch_norm_layers(toys.vit()) == []


def test_an_error_inside_leaves_the_statistics_and_no_hook():
    layer = nn.BatchNorm1d(3).eval()
    with pytest.raises(KeyError), follow_pool([layer]):
        layer(torch.randn(4, 3))
        raise KeyError
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 2)])
def test_weighted_moments_are_those_of_a_batch_with_repeated_examples(shape, generator):
    # Weights 2, 1, 3, ...: the same as a batch that holds the examples as often.
    inputs, times = torch.randn(shape, generator=generator), torch.tensor([2, 1, 3, 1, 1, 4])
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](4)
    nn.init.normal_(layer.weight, generator=generator)
    nn.init.normal_(layer.bias, generator=generator)
    repeated = torch.arange(6).repeat_interleave(times)
    expected = layer.train()(inputs[repeated])
    found = normalise_weighted(layer, inputs, times.float())
    torch.testing.assert_close(found[repeated], expected, rtol=1e-4, atol=1e-5)


def test_weights_of_one_are_batch_norm_with_its_gradient(generator):
    layer, inputs = nn.BatchNorm2d(3).train(), torch.randn((5, 3, 4, 4), generator=generator)
    gradients = []
    for function in (layer, lambda x: normalise_weighted(layer, x, torch.ones(5))):
        leaf = inputs.clone().requires_grad_()
        function(leaf).pow(3).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("policy", ["batch", "weighted", "running", "untouched"])
def test_running_statistics_follow_the_uniform_data_and_not_the_hard_examples(tmp_path, digits, policy):
    model, data = train(tmp_path, digits, policy)
    expected = first_layer_mean(model, data)
    found = model.resnet.embedder.embedder.normalization.running_mean
    distance = float((found - expected).norm() / expected.norm())
    assert distance > 0.2 if policy == "untouched" else distance < 0.05, distance


def test_frozen_statistics_do_not_move(tmp_path, digits):
    model, _ = train(tmp_path, digits, "frozen")
    assert float(model.resnet.embedder.embedder.normalization.running_mean.norm()) == 0
    assert model.resnet.embedder.embedder.normalization.num_batches_tracked == 0


def test_with_running_statistics_a_gradient_does_not_depend_on_its_neighbours(tmp_path, digits):
    # Weights 1 and 0: the second example's pixels must not reach the first one's gradient.
    args = toys.arguments(tmp_path, batch_norm="running")
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


def test_the_batch_policy_normalises_with_the_batch_and_is_undone_after_training(tmp_path, digits):
    model, _ = train(tmp_path, digits, "batch")
    assert all(layer.track_running_stats for layer in batch_norm_layers(model))
    args = toys.arguments(tmp_path, batch_norm="batch")
    trainer = ImportanceTrainer(toys.resnet(), args, train_dataset=digits)
    twin, batch = toys.resnet().train(), digits[:6]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    loss = trainer.compute_loss(trainer.model.train(), {**batch, "importance_weights": torch.ones(6)})
    torch.testing.assert_close(loss, twin(**batch).loss)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
