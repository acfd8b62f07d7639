"""The closed-form scores are the norms that autograd finds; the true gradient norm is one backward an example."""

import pytest
import reference
import torch
import torch.nn.functional as F

from hf_importance.heads import losses, scores


@pytest.fixture
def logits(generator):
    return 3 * torch.randn(7, 5, generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_score_is_the_logit_gradient(logits, smoothing):
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    expected = reference.logit_gradient_norms(
        lambda row, i: F.cross_entropy(row, labels[i], label_smoothing=smoothing), logits
    )
    found = scores.upper_bound(logits, labels, smoothing)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    by_autograd = scores.logit_gradient_norm(lambda z: losses.cross_entropy(z, labels, smoothing), logits)
    torch.testing.assert_close(found, by_autograd, rtol=1e-5, atol=1e-6)


def test_binary_score_is_the_logit_gradient(logits, generator):
    labels = torch.rand(7, 5, generator=generator).round()
    expected = reference.logit_gradient_norms(
        lambda row, i: F.binary_cross_entropy_with_logits(row, labels[i].double()), logits
    )
    torch.testing.assert_close(scores.binary_upper_bound(logits, labels).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("outputs", [1, 5])
def test_squared_error_score_is_the_logit_gradient(logits, generator, outputs):
    logits, labels = logits[:, :outputs], torch.randn(7, outputs, generator=generator)
    expected = reference.logit_gradient_norms(lambda row, i: F.mse_loss(row, labels[i].double()), logits)
    found = scores.squared_error_upper_bound(logits, labels if outputs > 1 else labels[:, 0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_well_fitted_example_keeps_its_digits():
    # At a margin of 30 nats p_y rounds to 1 in float32; the score is sqrt(2) exp(-30), not 0.
    found = scores.upper_bound(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))
    assert float(found) == pytest.approx(2**0.5 * torch.tensor(-30.0).exp().item(), rel=1e-5)


def test_an_ignored_label_has_no_score_and_no_loss(logits):
    labels = torch.tensor([0, -100, 2, 3, -100, 0, 1])
    for smoothing in (0.0, 0.1):
        assert scores.upper_bound(logits, labels, smoothing)[[1, 4]].tolist() == [0, 0]
        assert losses.cross_entropy(logits, labels, smoothing)[[1, 4]].tolist() == [0, 0]


def test_half_precision_logits_are_scored_in_float32(logits):
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    found = scores.upper_bound(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores.upper_bound(logits.bfloat16().float(), labels))


def test_the_scores_carry_no_graph(logits):
    assert not scores.upper_bound(logits.requires_grad_(), torch.zeros(7, dtype=torch.long)).requires_grad


def test_gradient_norm_is_one_backward_an_example_and_leaves_grad_alone(generator):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    inputs, labels = torch.randn(5, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = scores.gradient_norm((F.cross_entropy(model(inputs[i]), labels[i]) for i in range(5)), trainable)
    assert all(p.grad is None for p in model.parameters())
    for i in range(5):
        model.zero_grad()
        F.cross_entropy(model(inputs[i]), labels[i]).backward()
        expected = torch.cat([p.grad.flatten() for p in trainable]).double().norm()
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-5)
