"""Pools drawn by memory and kept by fresh scores: unbiased in both phases, priced by what is measured."""

import itertools
import math

import pytest
import reference
import torch
import toys

from hf_importance import History, ImportanceTrainer, Presample
from hf_importance.batches.entries import WEIGHTS
from hf_importance.samplers.sampler import Scored
from hf_importance.samplers.two_phase import TwoPhase, TwoPhaseFactor
from hf_importance.theory.costs import best_share
from hf_importance.theory.sampling import inclusion_probabilities
from hf_importance.theory.variance import SHARES, inverse_moments

REMEMBERED, FRESH, VALUES = [0.2, 0.5, 1.0, 2.0], [0.3, 1.5, 0.4, 1.0], [2.0, -1.0, 0.5, 3.0]


def over_orders(probabilities):
    """Every outcome of a systematic draw in a random order."""
    orders = list(itertools.permutations(range(len(probabilities))))
    for order in orders:
        for chance, drawn in reference.systematic_outcomes(probabilities, list(order)):
            yield chance / len(orders), drawn


@pytest.mark.parametrize("kept", [1, 2])
def test_over_all_outcomes_of_both_phases_weights_multiply_to_the_mean(kept):
    examples, size, expected, weight = 4, 3, 0.0, 0.0
    first = inclusion_probabilities(torch.tensor(REMEMBERED), size).tolist()
    for chance, pool in over_orders(first):
        weights = torch.tensor([size / (examples * first[i]) for i in pool]).double()
        scores = torch.tensor([FRESH[i] for i in pool]).double()
        second = inclusion_probabilities(scores * weights, kept).tolist()
        for again, rows in over_orders(second):
            for row in rows:
                total = float(weights[row]) * kept / (size * second[row])
                expected += chance * again * total * VALUES[pool[row]] / kept
                weight += chance * again * total / kept
    assert expected == pytest.approx(sum(VALUES) / 4) and weight == pytest.approx(1.0)


def test_it_keeps_by_both_scores_with_the_weights_of_the_second_phase():
    sampler = TwoPhase()
    sampler.fresh.in_training = lambda scores: scores
    weights, scores = torch.tensor([2.0, 0.5, 1.0, 0.25]).double(), torch.tensor(FRESH).double()
    inclusion = inclusion_probabilities(scores * weights, 2)
    for seed in range(20):
        pool = Scored(scores, None, 4, 2, weights, (4,), generator=torch.Generator().manual_seed(seed))
        rows, found = sampler.keep(pool)
        torch.testing.assert_close(found, 2 / (4 * inclusion[rows]))


def test_the_factor_is_held_against_uniform_examples():
    # Perfect memory and fresh scores: at f = 1 the pool is worth the gain of the memory, and all shares are alike.
    scores = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    proposal = scores / scores.mean()
    drawn = torch.multinomial(proposal, 4000, replacement=True, generator=torch.Generator().manual_seed(1))
    weights = 1 / proposal[drawn]
    factor = TwoPhaseFactor(0.0)
    factor.average(inverse_moments(scores[drawn] * weights).tolist())
    factor.uniform = float((weights * scores[drawn].square()).sum())
    gain = float(scores.square().mean() / scores.mean() ** 2)
    assert float(factor(1.0)) == pytest.approx(1 / gain, rel=0.05)
    # What uniformly drawn examples say of the same pools, each standing for 1 / w of them.
    other, own = TwoPhaseFactor(0.0), 1 / proposal
    other.average(inverse_moments(scores * own, 1 / own).tolist())
    other.uniform = float(scores.square().sum())
    assert other(SHARES[::8]).tolist() == pytest.approx(factor(SHARES[::8]).tolist(), rel=0.1)
    assert best_share(other, 1 / 3)[1] < best_share(lambda f: 1 / (f * gain), 1 / 3)[1]


class Always(TwoPhase):
    """Draws by memory as soon as it can."""

    def price(self):
        return 0.01 if math.isfinite(super().price()) else math.inf


class Look(ImportanceTrainer):
    """Keeps how much each step's weights are over those of the whole batch, and how many are kept."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        handed = toys.handed(self, batches)
        if self.sampler.state.pooled and handed[0].get(WEIGHTS) is not None:
            kept = sum(len(batch[WEIGHTS]) for batch in handed)
            total = sum(float(batch[WEIGHTS].sum()) for batch in handed) / float(items)
            self.__dict__.setdefault("found", []).append((total, kept))
        return batches, items


def uneven(outputs, labels):
    return 0.05 + (labels == 0).float() + 0.01 * outputs.logits[:, 0].sigmoid()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_a_run_weights_add_up_to_those_of_a_uniform_step(tmp_path, accumulation):
    # Nothing is learnt, so memory is exact. The loss is the sum of weighted ones over items.
    sampler = Always(Presample(kappa=0.2, margin=1.0), History(margin=1.0))
    args = toys.arguments(
        tmp_path, max_steps=240 // accumulation, learning_rate=0.0, presample_ratio=None, tau_threshold=None,
        gradient_accumulation_steps=accumulation, logging_steps=4,
    )  # fmt: skip
    trainer = Look(toys.bert(), args, train_dataset=toys.sentences(256), sampler=sampler, compute_score_func=uneven)
    trainer.train()
    totals, kept = torch.tensor(trainer.found).double().T
    assert len(totals) > 60 // accumulation
    assert abs(float(totals.mean()) - 1) < 4 * float(totals.std()) / len(totals) ** 0.5 + 0.01
    assert float(kept.max()) < 16 * accumulation
    prices = [e["importance/price_two_phase"] for e in trainer.state.log_history if "importance/price_two_phase" in e]
    assert prices and max(prices) == 0.01
    assert any(e.get("importance/examples_scored", 0) > 0 for e in trainer.state.log_history)
