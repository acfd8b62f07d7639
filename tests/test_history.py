"""The table, its calibration and its passes, against enumeration and slow twins."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from hf_importance.batches.random import key_to_seed
from hf_importance.batches.visits import Order
from hf_importance.ranks import Ranks
from hf_importance.run.table import COLUMNS, Table
from hf_importance.samplers import proposal as proposals
from hf_importance.samplers.history import History
from hf_importance.samplers.proposal import Proposal, comb
from hf_importance.samplers.sampler import Facts, Scored
from hf_importance.theory.calibration import PAIRS_PER_BIN, Calibration, calibrate
from hf_importance.theory.sampling import inclusion_probabilities, systematic_draw

ALONE = Ranks(SimpleNamespace(num_processes=1, process_index=0))


def scores_with_memory(examples: int, memory: float, seed: int = 0, spread: float = 1.0):
    """Log-normal scores of two visits, of which the logarithms correlate by ``memory``."""
    random = np.random.default_rng(seed)
    first = random.standard_normal(examples)
    second = memory * first + math.sqrt(1 - memory**2) * random.standard_normal(examples)
    return [torch.tensor(np.exp(spread * x), dtype=torch.float32) for x in (first, second)]


def filled(examples: int = 4000, memory: float = 0.9, share: float = 0.1, spread: float = 1.0):
    """A table after two visits of every example, and what it proposes."""
    table, proposal = Table(examples, ALONE), Proposal(share)
    for step, found in enumerate(scores_with_memory(examples, memory, spread=spread)):
        table.add(torch.arange(examples), found.double(), torch.ones(examples).double(), step)
        table.exchange()
    proposal.refit(table.scores, table.pairs)
    return table, proposal


def drawn(table: Table, proposal: Proposal, size: int, seed: int = 0):
    """Examples in the order of their visits, and their weights."""
    return proposal.draw(table.scores, size, torch.Generator().manual_seed(seed))


def gain_of_a_draw(table: Table, proposal: Proposal, found: torch.Tensor, fraction: float) -> float:
    """The measured gain over the examples that one draw visits."""
    index, weights = drawn(table, proposal, int(len(table.scores) * fraction))
    weights, visited = weights.double(), found[index.long()].double()
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
    monkeypatch.setattr(proposals, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 20, 29):
        inclusion = inclusion_probabilities(torch.rand(30, generator=generator), size)
        order = torch.randperm(30, generator=generator, dtype=torch.int32)
        found = comb(lambda i: i, inclusion, order.clone(), 0.37, 0)
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
        comb(lambda i: i, inclusion, torch.tensor(order, dtype=torch.int32), (k + 0.5) / 12, rotation).long()
        for order in itertools.permutations(range(5))
        for k in range(12)
        for rotation in range(size)
    ]
    drawn = torch.stack([weights[index] * values[index] for index in outcomes])
    torch.testing.assert_close(drawn.mean(0), values.mean().expand(size), rtol=1e-12, atol=0)
    often = torch.bincount(torch.cat(outcomes)).double() / len(outcomes)
    torch.testing.assert_close(often, inclusion)


def test_a_pass_visits_no_example_twice_and_weights_are_bounded():
    index, weights = drawn(*filled(share=0.2), size=2800)
    assert len(index) == len(index.unique()) == 2800
    assert weights.max() <= 1 / 0.2
    assert float(weights.mean()) == pytest.approx(1, abs=0.05)


def test_ranks_share_a_pass_and_sizes_differ_by_one_at_most():
    index, weights = drawn(*filled(), size=660)
    order = Order(index, weights, batch_size=3.3, length=100, number=0)
    rows = [[index[order.rows(m, rank, 2)] for rank in range(2)] for m in range(100)]
    assert {len(part) for pair in rows for part in pair} == {3, 4}
    assert all(len(a) == len(b) for a, b in rows)
    assert sorted(torch.cat([p for pair in rows for p in pair]).tolist()) == sorted(index.tolist())


def test_unseen_examples_are_drawn_like_the_largest():
    table, proposal = filled()
    table.scores[:100] = torch.nan
    proposal.refit(table.scores, table.pairs)
    weights = proposal.weights(table.scores)
    assert (weights[:100] == weights.min()).all()


# ---- What it is worth ----


@pytest.mark.parametrize("memory", [0.5, 0.9])
def test_the_measured_gain_is_the_promised_one(memory):
    table, proposal = filled(20_000, memory)
    fresh = scores_with_memory(20_000, memory, seed=0)
    # The next visit is to the last as the last is to the one before.
    random = np.random.default_rng(5)
    noise = torch.tensor(random.standard_normal(20_000), dtype=torch.float32)
    found = torch.exp(memory * fresh[1].log() + math.sqrt(1 - memory**2) * noise)
    promised = float((found.double() ** 2).mean() / (proposal.weights(table.scores) * found.double() ** 2).mean())
    assert gain_of_a_draw(table, proposal, found, 0.1) == pytest.approx(promised, rel=0.15)
    assert promised > 1.2


def test_pure_noise_costs_nothing_calibrated_and_raw_scores_lose():
    table, proposal = filled(20_000, 0.0, share=0.01)
    random = np.random.default_rng(7)
    found = torch.tensor(np.exp(random.standard_normal(20_000)), dtype=torch.float32)
    assert gain_of_a_draw(table, proposal, found, 0.2) > 0.97
    raw = inclusion_probabilities(table.scores, 4000)
    raw_weights = 0.2 / raw
    assert float(found.square().mean() / (raw_weights * found.square()).mean()) < 0.6


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_promise_is_the_gain_over_every_draw(share):
    # Exact: all orders and offsets, of examples that score what their bin does.
    levels, counts = [0.2, 1.0, 3.0], [2, 2, 1]
    scores = torch.tensor(levels, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    proposal = Proposal(share)
    proposal.take(
        Calibration(torch.tensor([0.5, 2.0]), torch.tensor(levels, dtype=torch.float64)), torch.tensor(counts)
    )
    for size in (1, 2, 3, 5):
        inclusion = inclusion_probabilities(proposal.relative, size, proposal.counts)
        each = inclusion[proposal.calibration.bins(scores.float()).long()]
        exact = reference.gain_of_a_draw(scores.tolist(), each.tolist())
        assert proposal.promised_gain(size / 5) == pytest.approx(exact, rel=1e-9)
    assert proposal.promised_gain(0) == proposal.promised_gain(1 / 5)


def test_a_forecast_is_the_promise_times_how_earlier_ones_were_kept():
    table, sampler = filled()[0], History()
    sampler.begin(facts(table, examples=4000, batch_size=16, accumulation=1, updates=250, ranks=1))
    sampler.calibrate()
    random, steps = torch.Generator().manual_seed(0), []
    for promise in (1.5, 1.6, 2.0):
        sampler.state.promised = promise
        for count in (16.0, 10.0, 11.0):
            found = (1 + torch.rand(2, generator=random)).tolist()
            sampler.learn(1.5, [count, *found])
            steps.append((promise, count, *found))
    sampler.state.promised = 3.0
    assert sampler.gain == pytest.approx(reference.forecast(3.0, steps, 250 / 2 * 16))


class Growing:
    """A run whose scores spread as it trains: of each visit exp(s z) with a z that memory knows by 0.9."""

    examples, batch, updates = 12_800, 64, 200

    def __init__(self, budget="constant_variance", **settings):
        self.table, self.sampler, self.step, self.number = (
            Table(self.examples, ALONE),
            History(budget, **settings),
            0,
            0,
        )
        self.random = torch.Generator().manual_seed(0)
        self.known = torch.randn(self.examples, generator=self.random)
        self.sampler.begin(
            facts(
                self.table, examples=self.examples, batch_size=self.batch, updates=self.updates, ranks=1,
                accumulation=1, micro_batches=self.updates, place=lambda: self.step % self.updates,
                visiting=lambda: self.step > 0, draws=lambda: self.number, step=lambda: self.step,
                steps=lambda: 10 * self.updates,
                generator=lambda *key: torch.Generator().manual_seed(key_to_seed(0, *key)),
            )
        )  # fmt: skip

    def found(self, index):
        """Score examples at this step."""
        noise = torch.randn(len(index), generator=self.random)
        spread = 0.3 + 0.1 * self.step / self.updates
        return torch.exp(spread * (0.9 * self.known[index] + 0.44 * noise)).double()

    def train(self, index, weights, kind):
        """Make a step, and give its mean w Ĝ² and w² Ĝ²."""
        seen = Scored(self.found(index), index, 0, 0, weights, kind=kind)
        sums = self.sampler.measure(seen)
        self.table.add(index, seen.scores, weights, self.step)
        self.table.exchange()
        self.sampler.learn(1.5, sums)
        self.step += 1
        return sums[1] / len(index), sums[2] / len(index)

    def epoch(self):
        """Give the noise of an epoch's steps over that of uniform ones."""
        noise = uniform = 0.0
        while True:
            visits = self.sampler.visits() if self.step else None
            self.number += 1
            if visits is None:
                order = torch.randperm(self.examples, generator=self.random).split(self.batch)
                parts = [(index, torch.ones(len(index), dtype=torch.float64)) for index in order]
            else:
                sizes = torch.tensor([math.floor(m * visits.batch_size) for m in range(visits.micro_batches + 1)])
                sizes = sizes.diff().tolist()
                parts = [*zip(visits.index.long().split(sizes), visits.weights.double().split(sizes), strict=True)]
            for index, weights in parts:
                second, drawn = self.train(index, weights, "batch" if visits is None else "visits")
                uniform, noise = uniform + second / self.batch, noise + drawn / len(index)
            if self.step % self.updates == 0:
                return noise / uniform


def test_steps_hold_the_noise_of_uniform_ones_while_the_gain_grows():
    run = Growing()
    for _ in range(3):
        run.epoch()
    noises = [run.epoch() for _ in range(4)]
    assert run.sampler.state.drawn and run.sampler.gain > 1.5
    assert noises == pytest.approx([1.0] * 4, abs=0.05)
    assert sum(noises) / 4 == pytest.approx(1.0, abs=0.02)


# ---- The table ----


def test_of_two_visits_the_later_stays_and_nonfinite_scores_do_not():
    table = Table(4, ALONE)
    for step, index, found in ((1, [1], [5.0]), (2, [1], [6.0]), (3, [2, 3], [torch.nan, torch.inf])):
        table.add(torch.tensor(index), torch.tensor(found).double(), torch.ones(len(index)).double(), step)
    assert table.visits.tolist() == [0, 0, 0, 0]  # not yet
    table.exchange()
    assert table.scores[1] == 6
    assert table.seen.tolist() == [0, 2, 0, 0]
    assert table.scores.isnan().tolist() == [True, False, True, True]
    assert table.visits.tolist() == [0, 2, 1, 1]
    assert table.weight_sum.tolist() == [0, 2, 1, 1]


def test_what_was_only_scored_is_remembered_and_no_visit():
    table = Table(3, ALONE)
    table.add(torch.tensor([0, 2]), torch.tensor([5.0, 6.0]).double(), torch.tensor([0.0, 1.5]).double(), 1)
    table.exchange()
    assert table.scores.nan_to_num(nan=-1).tolist() == [5, -1, 6]
    assert table.visits.tolist() == [0, 0, 1]
    assert table.weight_sum.tolist() == [0, 0, 1.5]


def facts(table: Table, **known) -> Facts:
    """What a sampler knows of a run with this table; what is not given it does not ask for."""
    given = {"table": table, "gathered": 1, "fewest": 1, "step": lambda: 0, "steps": lambda: 10_000, **known}
    return Facts(**{**dict.fromkeys(Facts.__dataclass_fields__), **given})


def visits(half: int):
    return torch.arange(50), torch.rand(50, generator=torch.Generator().manual_seed(half)).double()


def test_state_and_tensors_are_all_there_is():
    known = {"examples": 4000, "batch_size": 16, "accumulation": 1, "updates": 250, "ranks": 1}
    whole, sampler = filled()[0], History()
    sampler.begin(facts(whole, **known))
    sampler.calibrate()
    sampler.learn(1.5, [160.0, 300.0, 200.0])
    whole.add(*visits(1), torch.ones(50).double(), 3)  # on its way
    twin, other = Table(4000, ALONE), History()
    other.begin(facts(twin, **known))
    before = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    twin.load(dataclasses.replace(whole.state), before, "file")
    other.load_state_dict(sampler.state_dict())
    assert other.proposal.weights(twin.scores).equal(sampler.proposal.weights(whole.scores))
    for table, one in ((whole, sampler), (twin, other)):
        table.add(*visits(2), torch.ones(50).double(), 4)
        table.exchange()
        one.learn(1.5, [16.0, 30.0, 30.0])
        one.calibrate()
    assert drawn(whole, sampler.proposal, 800)[0].equal(drawn(twin, other.proposal, 800)[0])
    assert drawn(whole, sampler.proposal, 800)[1].equal(drawn(twin, other.proposal, 800)[1])
    assert sampler.state_dict() == other.state_dict()
    assert sampler.gain == other.gain > 1
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(twin.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_saving_changes_nothing():
    table, _ = filled()
    table.add(*visits(1), torch.ones(50).double(), 3)
    before, state = {name: getattr(table, name).clone() for name in COLUMNS}, dataclasses.replace(table.state)
    table.tensors()
    assert table.state == state and state.waiting == 1
    for name, tensor in before.items():
        torch.testing.assert_close(getattr(table, name), tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores", -1.0),
        ("scores", torch.inf),
        ("visits", -1),
        ("seen", -1),
        ("weight_sum", torch.nan),
        ("weight_sum", -0.5),
        ("pairs", torch.nan),
        ("pairs", -2.0),
        ("rows", torch.nan),
        ("rows", -1.0),
        ("rows", 4000.0),
    ],
)
def test_a_damaged_table_is_refused_by_its_file(name, value):
    whole = filled()[0]
    whole.add(*visits(1), torch.ones(50).double(), 3)
    tensors = {key: tensor.clone() for key, tensor in whole.tensors().items()}
    tensors[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=r"some/file holds scores or weights that are negative or not finite"):
        Table(4000, ALONE).load(whole.state, tensors, "some/file")


def test_a_table_of_other_shapes_is_refused_by_its_file():
    whole = filled()[0]
    for name, tensor in whole.tensors().items():
        for wrong in (None, tensor[:-1] if len(tensor) else tensor[:, :3], tensor.half()):
            tensors = {**whole.tensors(), name: wrong}
            if wrong is None:
                del tensors[name]
            with pytest.raises(ValueError, match=rf"some/file: {name}"):
                Table(4000, ALONE).load(whole.state, tensors, "some/file")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("edges", lambda edges: edges[:-1]),
        ("edges", lambda edges: edges[::-1]),
        ("levels", lambda levels: []),
        ("levels", lambda levels: levels[::-1]),
        ("counts", lambda counts: [*counts, 1]),
        ("counts", lambda counts: [0] * len(counts)),
    ],
)
def test_a_damaged_calibration_is_refused(name, change):
    sampler, other = History(), History()
    for one in (sampler, other):
        one.begin(facts(filled()[0]))
    sampler.calibrate()
    state = sampler.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match="edges, levels and counts do not fit together"):
        other.load_state_dict({**state, name: change(state[name])})


def test_a_draw_longer_than_the_data_or_of_unknown_scores_is_refused():
    with pytest.raises(ValueError, match="4001 examples cannot be drawn from 4000"):
        drawn(*filled(), size=4001)
    with pytest.raises(ValueError, match="cannot be drawn"):
        drawn(Table(100, ALONE), Proposal(0.1), size=10)


def test_a_draw_of_everything_gains_nothing_and_short_ones_gain_all():
    _, proposal = filled(spread=1.5)
    gains = [proposal.promised_gain(fraction) for fraction in (1.0, 0.5, 0.1, 0.01)]
    assert gains[0] == pytest.approx(1)
    assert gains == sorted(gains)
    splits = proposal.splits_for(1.0)
    assert splits > 2
    assert proposal.promised_gain(1 / splits) > 0.97 * gains[-1] > proposal.promised_gain(1.0)
