"""The table, its calibration and its passes, against enumeration and slow twins."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from hf_importance import history as module
from hf_importance.calibration import PAIRS_PER_BIN, calibrate
from hf_importance.history import History, draw_pass
from hf_importance.sampling import inclusion_probabilities, systematic_draw


def scores_with_memory(examples: int, memory: float, seed: int = 0, spread: float = 1.0):
    """Log-normal scores of two visits, of which the logarithms correlate by ``memory``."""
    random = np.random.default_rng(seed)
    first = random.standard_normal(examples)
    second = memory * first + math.sqrt(1 - memory**2) * random.standard_normal(examples)
    return [torch.tensor(np.exp(spread * x), dtype=torch.float32) for x in (first, second)]


def filled(examples: int = 4000, memory: float = 0.9, share: float = 0.1, spread: float = 1.0) -> History:
    """A history after two visits of every example."""
    history = History(examples, seed=0, uniform_share=share)
    for step, found in enumerate(scores_with_memory(examples, memory, spread=spread)):
        history.record(
            torch.arange(examples), found, torch.full((examples,), step, dtype=torch.int32), torch.ones(examples)
        )
    history.refit()
    return history


def gain_of_a_pass(history: History, found: torch.Tensor, fraction: float) -> float:
    """The measured gain over the examples that one pass visits."""
    length = int(history.examples * fraction)
    history.begin_pass(1.0, length, 1)
    weights, visited = history.current.weights.double(), found[history.current.index.long()].double()
    return float((weights * visited**2).sum() / (weights**2 * visited**2).sum())


# ---- Calibration ----


def test_the_levels_are_the_isotonic_regression_of_the_squares():
    remembered, found = scores_with_memory(5000, 0.5)
    calibration = calibrate(remembered, found)
    bins = calibration.bins(remembered).long()
    counts = torch.bincount(bins).double()
    means = torch.zeros_like(counts).index_add_(0, bins, found.double() ** 2) / counts
    slow = IsotonicRegression().fit_transform(np.arange(len(counts)), means.numpy(), sample_weight=counts.numpy())
    np.testing.assert_allclose(calibration.levels.numpy(), np.sqrt(slow), rtol=1e-6)
    assert counts.min() >= PAIRS_PER_BIN / 2


def test_a_worthless_memory_is_flat_and_a_good_one_is_not():
    flat = calibrate(*scores_with_memory(20_000, 0.0))
    steep = calibrate(*scores_with_memory(20_000, 0.9))
    assert flat.levels.max() / flat.levels.min() < 1.5
    assert steep.levels.max() / steep.levels.min() > 10


def test_memory_that_is_reversed_is_flat_too():
    first, second = scores_with_memory(20_000, 0.9)
    levels = calibrate(first, 1 / second).levels
    assert levels.max() / levels.min() < 1.05


def test_too_few_pairs_and_zeros_calibrate_nothing():
    assert calibrate(torch.rand(4 * PAIRS_PER_BIN - 1), torch.rand(4 * PAIRS_PER_BIN - 1)) is None
    assert calibrate(torch.rand(1000), torch.zeros(1000)) is None


def test_equal_scores_make_one_bin():
    calibration = calibrate(torch.ones(1000), torch.ones(1000))
    assert calibration.levels[calibration.bins(torch.ones(1)).long()] == 1


def test_an_example_not_seen_counts_as_the_largest():
    calibration = calibrate(*scores_with_memory(5000, 0.9))
    assert calibration.bins(torch.tensor([torch.nan])) == len(calibration.levels) - 1


# ---- Inclusion probabilities and draws ----


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 6)), min_size=1, max_size=8), st.data())
def test_inclusion_by_bins_is_that_of_the_examples(bins, data):
    relative = torch.tensor([r for r, _ in bins], dtype=torch.float64)
    counts = torch.tensor([c for _, c in bins])
    if counts.sum() == 0:
        return
    size = data.draw(st.integers(1, int(counts.sum())))
    found = inclusion_probabilities(relative, size, counts)
    slow = inclusion_probabilities(relative.repeat_interleave(counts), size)
    torch.testing.assert_close(found.repeat_interleave(counts), slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_a_pass_is_the_systematic_draw(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 20, 29):
        inclusion = inclusion_probabilities(torch.rand(30, generator=generator), size)
        order = torch.randperm(30, generator=generator, dtype=torch.int32)
        found = draw_pass(lambda i: i, inclusion, order.clone(), 0.37, 0)
        slow = systematic_draw(inclusion, order.long(), 1 - 0.37)
        assert found.tolist() == slow.tolist()


def test_every_place_of_a_pass_is_unbiased():
    # All orders, rotations, and offsets between the jumps, which lie at twelfths: exact, not statistics.
    # Three places: of two, each is the other's mirror image, and both are right without the rotation.
    twelfths = [12, 10, 8, 5, 1]
    size, values = sum(twelfths) // 12, torch.tensor([1.0, 10.0, 100.0, 1000.0, 10_000.0], dtype=torch.float64)
    inclusion = torch.tensor(twelfths, dtype=torch.float64) / 12
    weights = size / len(values) / inclusion
    outcomes = [
        draw_pass(lambda i: i, inclusion, torch.tensor(order, dtype=torch.int32), (k + 0.5) / 12, rotation).long()
        for order in itertools.permutations(range(5))
        for k in range(12)
        for rotation in range(size)
    ]
    drawn = torch.stack([weights[index] * values[index] for index in outcomes])
    torch.testing.assert_close(drawn.mean(0), values.mean().expand(size), rtol=1e-12, atol=0)
    often = torch.bincount(torch.cat(outcomes)).double() / len(outcomes)
    torch.testing.assert_close(often, inclusion)


def test_a_pass_visits_no_example_twice_and_weights_are_bounded():
    history = filled(share=0.2)
    history.begin_pass(3.5, 400, 2)
    current = history.current
    assert len(current.index) == len(current.index.unique()) == 2800
    assert current.weights.max() <= 1 / 0.2
    assert float(current.weights.mean()) == pytest.approx(1, abs=0.05)
    assert history.skipped_share == pytest.approx(1 - 2800 / 4000)


def test_ranks_share_a_pass_and_sizes_differ_by_one_at_most():
    history = filled()
    history.begin_pass(3.3, 100, 2)
    current = history.current
    rows = [[current.index[current.rows(m, rank, 2)] for rank in range(2)] for m in range(100)]
    assert {len(part) for pair in rows for part in pair} == {3, 4}
    assert all(len(a) == len(b) for a, b in rows)
    assert sorted(torch.cat([p for pair in rows for p in pair]).tolist()) == sorted(current.index.tolist())


def test_unseen_examples_are_drawn_like_the_largest():
    history = filled()
    history.scores[:100] = torch.nan
    history.refit()
    weights = history.proposed_weights(torch.arange(4000))
    assert (weights[:100] == weights.min()).all()


# ---- What it is worth ----


@pytest.mark.parametrize("memory", [0.5, 0.9])
def test_the_measured_gain_is_the_promised_one(memory):
    history = filled(20_000, memory)
    fresh = scores_with_memory(20_000, memory, seed=0)
    # The next visit is to the last as the last is to the one before.
    random = np.random.default_rng(5)
    noise = torch.tensor(random.standard_normal(20_000), dtype=torch.float32)
    found = torch.exp(memory * fresh[1].log() + math.sqrt(1 - memory**2) * noise)
    index = torch.arange(20_000)
    promised = float((found.double() ** 2).mean() / (history.proposed_weights(index) * found.double() ** 2).mean())
    assert gain_of_a_pass(history, found, 0.1) == pytest.approx(promised, rel=0.15)
    assert promised > 1.2


def test_pure_noise_costs_nothing_calibrated_and_raw_scores_lose():
    history = filled(20_000, 0.0, share=0.01)
    random = np.random.default_rng(7)
    found = torch.tensor(np.exp(random.standard_normal(20_000)), dtype=torch.float32)
    assert gain_of_a_pass(history, found, 0.2) > 0.97
    raw = inclusion_probabilities(history.scores, 4000)
    raw_weights = 0.2 / raw
    assert float(found.square().mean() / (raw_weights * found.square()).mean()) < 0.6


# ---- The table ----


def test_of_two_visits_the_later_stays_and_nonfinite_scores_do_not():
    history = History(4, seed=0, uniform_share=0.1)
    steps = torch.tensor([1, 2, 3, 3], dtype=torch.int32)
    history.record(torch.tensor([1, 1, 2, 3]), torch.tensor([5.0, 6.0, torch.nan, torch.inf]), steps, torch.ones(4))
    assert history.scores[1] == 6
    assert history.seen.tolist() == [0, 2, 0, 0]
    assert history.scores.isnan().tolist() == [True, False, True, True]
    assert history.visits.tolist() == [0, 2, 1, 1]
    assert history.weight_sum.tolist() == [0, 2, 1, 1]


def test_state_and_tensors_are_all_there_is():
    whole = filled()
    whole.begin_pass(4.0, 100, 1)
    whole.current.position = 7
    copy = History(4000, seed=0, uniform_share=0.1)
    copy.load(whole.state_dict(), {name: tensor.clone() for name, tensor in whole.tensors().items()})
    for both in (whole, copy):
        both.record(
            torch.arange(50),
            torch.rand(50, generator=torch.Generator().manual_seed(1)),
            torch.ones(50).int(),
            torch.ones(50),
        )
        both.refit()
        both.begin_pass(2.0, 200, 1)
    assert torch.equal(whole.current.index, copy.current.index)
    assert torch.equal(whole.current.weights, copy.current.weights)
    assert whole.state_dict() == copy.state_dict()


def test_a_pass_longer_than_the_data_or_of_unknown_scores_is_refused():
    with pytest.raises(ValueError, match="A pass of 4001 examples cannot be drawn from 4000"):
        filled().begin_pass(1.0, 4001, 1)
    with pytest.raises(ValueError, match="cannot be drawn"):
        History(100, 0, 0.1).begin_pass(1.0, 10, 1)


def test_a_pass_over_everything_gains_nothing_and_short_ones_gain_all():
    history = filled(spread=1.5)
    gains = [history.promised_gain(fraction) for fraction in (1.0, 0.5, 0.1, 0.01)]
    assert gains[0] == pytest.approx(1)
    assert gains == sorted(gains)
    passes = history.passes_for(1.0)
    assert passes > 2
    assert history.promised_gain(1 / passes) > 0.97 * gains[-1] > history.promised_gain(1.0)
