"""BatchNorm: the running statistics move by the pool as one training pass of it would move them."""

import pytest
import torch
import toys
from torch import nn

from hf_importance.batch_norm import batch_norm_layers, follow_pool


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
