"""Over all outcomes of the draws on two ranks, the mean of the gradient averaged over both is the uniform gradient.

Nothing is sampled: every outcome is made to happen once, in the run's own step, and counts with its probability.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
import toys
from test_history import facts
from transformers import BertConfig, BertForTokenClassification

from hf_importance import Pool, Presample
from hf_importance.batches.pool import Padding
from hf_importance.heads.choose import head_of
from hf_importance.objective.loss import Objective
from hf_importance.objective.precision import Precision
from hf_importance.objective.scorer import Scorer
from hf_importance.ranks import Ranks
from hf_importance.reporting.report import Report
from hf_importance.run.clock import Clock
from hf_importance.run.pools import Pools
from hf_importance.run.step import Step
from hf_importance.theory import sampling
from hf_importance.transfer import Preparation

# Examples in the own batch and in the reserve of each rank: equal ones, and the short last batch of an uneven epoch.
SIZES = {"equal ranks": [(2, 1), (2, 1)], "a short batch on one rank": [(2, 2), (1, 2)]}
RANKS, BATCH = 2, 2


def classifier():
    return toys.bert(initializer_range=0.5)


def token_classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=50, num_labels=3, initializer_range=0.5, **sizes, **dropout)
    return BertForTokenClassification(config)


def batches(sizes, tokens, seed):
    """Give the batches of one pool; the rows of a token task count different numbers of items."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        inputs = torch.randint(10, 50, (size, 6), generator=generator)
        labels = torch.randint(0, 3, (size, 6) if tokens else (size,), generator=generator)
        if tokens:
            counts = torch.randint(1, 7, (size, 1), generator=generator)
            labels[torch.arange(6) >= counts] = -100
        found.append({"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels})
    return found


class Given(Ranks):
    """One of two ranks, whose sums over both are given to it."""

    def __init__(self, rank):
        super().__init__(SimpleNamespace(num_processes=RANKS, process_index=rank))
        self.totals, self.sent = None, []

    def sum(self, values):
        self.sent.append(list(values))
        return list(values) if self.totals is None else self.totals[len(self.sent) - 1]


class Rank:
    """One rank's step by fresh scores, with the draws and the sums over ranks given to it."""

    def __init__(self, rank, model, parts, method, kept):
        self.ranks, self.parts, self.model, self.kept = Given(rank), parts, model, kept
        self.objective = Objective(
            model,
            head_of(model, 0.0, None),
            "untouched",
            False,
            False,
            RANKS,
            averaged=RANKS,
            multiplied=RANKS,
            repairs=True,
            sharded=False,
        )
        sampler = Presample(ratio=3.0, threshold=2.0, resampling=method)
        known = facts(
            None,
            batch_size=BATCH,
            seed=0,
            step=lambda: 1,
            generator=lambda *key: torch.Generator().manual_seed(sum(key)),
        )
        sampler.begin(known)
        reserve = SimpleNamespace(padding=Padding(), streaming=False, where=lambda: None, in_passes=lambda rest: rest)
        reserve.rest_of = lambda planned, count, iterator: self.parts[1:]
        clock, report = Clock(torch.device("cpu"), self.ranks), Report(lambda values: values)
        scorer = Scorer(lambda: model, self.objective.head)
        ours = (self.objective, reserve, self.ranks, clock, known, report)
        self.pools = Pools(
            sampler,
            scorer,
            *ours,
            prepare=Preparation(lambda batch: batch, False, 0, torch.device("cpu")),
            precision=Precision(scorer, self.ranks, torch.device("cpu"), None),
            waits_in_passes=False,
        )

    def step(self, totals=None):
        """Give the gradient of one importance step; the sums over ranks are ``totals``, its own where None."""
        self.ranks.totals, self.ranks.sent = totals, []
        step = Step(1, "pool", drawn=True)
        (batch,), _ = self.pools.score_and_keep(step, Pool(3 * BATCH, self.kept), [self.parts[0]], iter(()))
        assert step.problem is None
        loss, _, _ = self.objective.loss(None, self.model.train(), batch, None, True, None)
        return gradient(loss, self.model)


def gradient(loss, model):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def multinomial_outcomes(rank, totals, monkeypatch):
    """Give the probability and the gradient of every outcome of a draw with replacement."""
    seen = {}

    def first(probabilities, size, **kwargs):
        seen.update(probabilities=probabilities, size=size)
        return torch.zeros(size, dtype=torch.long)

    monkeypatch.setattr(torch, "multinomial", first)
    rank.step(totals)
    probabilities = seen["probabilities"]
    for index in itertools.product(range(len(probabilities)), repeat=seen["size"]):
        drawn = torch.tensor(index)
        monkeypatch.setattr(torch, "multinomial", lambda *args, drawn=drawn, **kwargs: drawn)
        yield float(probabilities[drawn].prod()), rank.step(totals)


def systematic_outcomes(rank, totals, monkeypatch):
    """Give the probability and the gradient of every order, and of every stretch of offsets that draws alike."""
    draw, seen = sampling.systematic_draw, {}

    def look(probabilities, order, offset):
        seen.update(probabilities=probabilities)
        return draw(probabilities, order, offset)

    monkeypatch.setattr(sampling, "systematic_draw", look)
    rank.step(totals)
    orders = list(itertools.permutations(range(len(seen["probabilities"]))))
    for order in map(torch.tensor, orders):
        monkeypatch.setattr(torch, "randperm", lambda *args, order=order, **kwargs: order)
        edges = seen["probabilities"][order].cumsum(0) % 1
        edges = torch.cat([edges.new_tensor([0.0, 1.0]), edges]).unique()
        for low, high in itertools.pairwise(edges.tolist()):
            if high - low > 1e-9:  # else two sums that rounding alone keeps apart
                offset = torch.tensor((low + high) / 2, dtype=torch.float64)
                monkeypatch.setattr(torch, "rand", lambda *args, offset=offset, **kwargs: offset)
                yield (high - low) / len(orders), rank.step(totals)


OUTCOMES = {"multinomial": multinomial_outcomes, "systematic": systematic_outcomes}


@pytest.mark.parametrize("kept", [BATCH, BATCH // 2])  # of a whole batch
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make_model", [classifier, token_classifier])
@pytest.mark.parametrize("method", OUTCOMES)
def test_the_mean_over_ranks_is_unbiased(monkeypatch, method, make_model, sizes, kept):
    model, tokens = make_model().double(), make_model is token_classifier
    pools = [batches(SIZES[sizes][rank], tokens, seed=rank) for rank in range(RANKS)]
    ranks = [Rank(rank, model, pool, method, kept) for rank, pool in enumerate(pools)]
    for rank in ranks:
        rank.step()  # what it sends does not depend on the draw
    calls = zip(*(rank.ranks.sent for rank in ranks), strict=True)
    totals = [[sum(values) for values in zip(*call, strict=True)] for call in calls]
    outcomes = []
    for rank in ranks:
        with monkeypatch.context() as patch:
            outcomes.append(list(OUTCOMES[method](rank, totals, patch)))

    assert [sum(chance for chance, _ in found) for found in outcomes] == pytest.approx([1.0] * RANKS)
    mean = 0.0
    for together in itertools.product(*outcomes):
        chance = together[0][0] * together[1][0]
        mean = mean + chance * (together[0][1] + together[1][1]) / RANKS  # as DDP averages

    # The law of docs: each rank's pool stands for its own batch; items are counted over both.
    total = items = 0.0
    for (own, _), pool in zip(SIZES[sizes], pools, strict=True):
        share = own / sum(len(part["labels"]) for part in pool)
        for part in pool:
            counted = (part["labels"] != -100).sum()
            total = total + share * model(**part).loss * counted
            items = items + share * counted
    torch.testing.assert_close(mean, gradient(total / items, model), rtol=1e-5, atol=1e-7)
