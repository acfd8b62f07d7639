"""What a pool's scores say of those in training: pairs from what is kept, draws and promises by them."""

import math

import pytest
import reference
import torch
import toys
from torch import nn

from hf_importance import ImportanceTrainer, Presample
from hf_importance.theory.calibration import ALIKE, BINS, InTraining, pair_sums
from hf_importance.theory.variance import SHARES, inverse_moments


def scores(count=4000, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4


def known(scored, found):
    calibrated = InTraining()
    calibrated.average(pair_sums(scored, found))
    return calibrated


def test_nothing_known_or_nothing_different_it_changes_nothing():
    drawn = scores()
    assert InTraining()(drawn) is drawn
    torch.testing.assert_close(known(drawn, drawn)(drawn)[drawn > 1e-6], drawn[drawn > 1e-6], rtol=1e-12, atol=0)


def test_sums_are_by_half_octaves_and_leave_out_what_is_not_finite():
    scored = torch.tensor([0.0, 0.6, 0.6, 0.9, math.inf, 0.6], dtype=torch.float64)
    found = torch.tensor([0.1, 0.5, 0.7, 1.0, 1.0, math.nan], dtype=torch.float64)
    counts, squares, others = torch.tensor(pair_sums(scored, found)).reshape(3, BINS)
    assert {int(k): int(counts[k]) for k in counts.nonzero()} == {0: 1, 46: 2, 47: 1}
    assert float(squares[46]) == pytest.approx(2 * 0.36) and float(others[46]) == pytest.approx(0.25 + 0.49)


def test_it_finds_the_expected_square_and_rises():
    # t² = s² + noise of mean 0.05²: as dropout does, which moves what is learnt more than what is not.
    drawn, noise = scores(), scores(seed=1) / float(scores(seed=1).mean())
    calibrated = known(drawn, (drawn.square() + 0.05**2 * noise).sqrt())
    asked = torch.logspace(-7, 0, 200, dtype=torch.float64)
    found = calibrated(asked)
    assert bool((found.diff() >= 0).all())
    torch.testing.assert_close(found, (asked.square() + 0.05**2).sqrt(), rtol=0.2, atol=0)


def test_a_bin_with_few_pairs_starts_from_its_own_score():
    calibrated = known(torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.33], dtype=torch.float64))
    expected = math.sqrt((0.33**2 + ALIKE * 2.0**-3.5) / (1 + ALIKE))  # the bin from 2^-2 to 2^-1.5
    assert float(calibrated(torch.tensor([0.3], dtype=torch.float64))) == pytest.approx(expected, rel=0.05)


def test_old_pairs_are_forgotten():
    drawn, calibrated = scores(), known(scores(), scores())
    for _ in range(8):
        calibrated.average(pair_sums(drawn, 2 * scores()))
    torch.testing.assert_close(calibrated(drawn)[drawn > 0.01], 2 * drawn[drawn > 0.01], rtol=0.05, atol=0)


def test_the_promise_is_the_variance_of_scores_in_training():
    # Two kinds of easy examples that only training tells apart: no draw by s can, and the promise says so.
    drawn = torch.tensor([0.02, 0.02, 0.02, 0.02, 0.5, 1.0], dtype=torch.float64)
    found = torch.tensor([0.0, 0.0, 0.0, 0.4, 0.5, 1.0], dtype=torch.float64)
    calibrated = known(drawn.repeat(200), found.repeat(200))
    by, kept = calibrated(drawn), 3
    inclusion = reference.inclusion_probabilities(by.tolist(), kept)
    true = sum(t * t / p for t, p in zip(found.tolist(), inclusion, strict=True)) / float(found.square().sum())
    moments = inverse_moments(by)
    promised = float(torch.from_numpy(moments)[int((SHARES - 0.5).__abs__().argmin())] / moments[-1])
    assert promised == pytest.approx(true, rel=0.02)
    naive = reference.inclusion_probabilities(drawn.tolist(), kept)
    unaware = sum(t * t / p for t, p in zip(found.tolist(), naive, strict=True)) / float(found.square().sum())
    assert unaware > 1.01 * true  # and drawing by s costs more


class Watched(Presample):
    """Keeps the pairs."""

    def compare(self, scored, found):
        self.__dict__.setdefault("pairs", []).append((scored, found))
        return super().compare(scored, found)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_pairs_are_of_the_same_examples(tmp_path, accumulation, given):
    # Without dropout, and with nothing learnt, both scores are the same; also with weights of the user's own.
    data = toys.sentences(256)
    if given:
        column = [1.0 + 0.5 * (i % 3) for i in range(256)]
        data = data.with_format(None).add_column("importance_weights", column).with_format("torch")
    sampler = Watched(ratio=3.0, threshold=1 + 1e-9, momentum=0.0)
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation, "remove_unused_columns": not given}
    trainer = ImportanceTrainer(toys.bert(), toys.arguments(tmp_path, **settings), train_dataset=data, sampler=sampler)
    trainer.train()
    pairs = [pair for pair in sampler.pairs if len(pair[0])]
    assert len(pairs) >= 5
    for scored, found in pairs:
        torch.testing.assert_close(scored, found, rtol=1e-5, atol=1e-7)
    assert sum(sampler.state.pairs[:BINS]) >= 0.95 * 16 * accumulation * (len(pairs) - 1)


class Two(nn.Module):
    """Reads one token, through a dropout before the head."""

    loss_type = "ForSequenceClassification"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.drop, self.head = nn.Embedding(50, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.drop(self.table(input_ids[:, 0])))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


@pytest.mark.parametrize("calibrate", [True, False])
def test_dropout_is_seen_and_more_is_kept(tmp_path, calibrate):
    sampler = Presample(kappa=0.1, calibrate=calibrate)
    args = toys.arguments(tmp_path, max_steps=120, learning_rate=3e-2, presample_ratio=None, tau_threshold=None)
    trainer = ImportanceTrainer(Two(), args, train_dataset=toys.sentences(256), sampler=sampler)
    trainer.train()
    counts, squares, found = torch.tensor(sampler.state.pairs).reshape(3, BINS)
    if not calibrate:
        assert sampler.state.pairs == [0.0] * 3 * BINS
        return
    assert float(counts.sum()) > 200
    assert float(found.sum()) > 1.1 * float(squares.sum())
