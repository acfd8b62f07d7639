"""Class weights of a loss are learnt from its rows, and then importance sampling is on, with the plain Trainer's mean.

The oracle is the plain Trainer's step itself: torch's weighted mean over uniform batches, whose expectation is not the
weighted mean over all examples, for the sum that it divides by holds the example that it weighs.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import toys
from launchers import ACCELERATE, launch, results
from scripts import (
    BATCH,
    CLASSES,
    EXAMPLES,
    FEATURES,
    RARE,
    Classifier,
    Counting,
    Gradients,
    Script,
    check_mean,
    check_off,
    check_switched_off,
    flat,
    make,
    points,
    run,
    same,
)
from scripts import METHODS as METHODS_OF_SCRIPTS
from test_right_or_off import after_super, focal, own_loss, weighted
from torch import nn
from torch.nn import functional as F
from transformers import default_data_collator

from hf_importance.heads.class_weights import ClassWeights, WeightState

METHODS = ("presample", "history", "auto")


def by_function(outputs, labels, num_items_in_batch=None):
    return weighted(outputs["logits"], labels)


def by_count(logits, labels):
    return (RARE[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()


def of_supers_outputs(trainer, model, loss, logits, labels):
    return weighted(logits, labels)


WAYS = {
    "overridden": Script(own_loss(weighted)),
    "of super's outputs": Script(after_super(of_supers_outputs)),
    "below": Script(own_loss(weighted), below=True),
    "in the model": Script(model=lambda: Classifier(RARE)),
    "function": Script(given={"compute_loss_func": by_function}),
    "by count": Script(own_loss(by_count)),
    "of the step's count": Script(model=lambda: Counting(RARE)),
}
BY_COUNT = ("by count", "of the step's count")


def uniform_mean(counting=False, batch=BATCH, draws=50_000):
    """Give the mean gradient of uniform batches: what batches give an example on average, by very many of them."""
    rows, model = points(), Classifier()
    x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    generator, weight = torch.Generator().manual_seed(1), RARE[labels].double()
    subsets = torch.rand(draws, len(x), generator=generator).argsort(1)[:, :batch]
    given = weight[subsets] / (batch if counting else weight[subsets].sum(1, keepdim=True))
    counts = torch.zeros(len(x), dtype=torch.float64).index_add(0, subsets.flatten(), given.flatten()) / draws
    (counts.float() * F.cross_entropy(model.logits(x), labels, reduction="none")).sum().backward()
    return flat(p.grad for p in model.parameters())


# ---- On ----


def quick(way, method):
    """All ways by pools, and two of them by the others, whose weights come from the same table; 4 s each."""
    return method == "presample" or way in ("overridden", "of the step's count")


@pytest.mark.parametrize(("way", "method"), toys.slow_but(quick, itertools.product(WAYS, METHODS)))
def test_the_mean_gradient_is_that_of_uniform_steps(way, method):
    ours = run(WAYS[way], method, max_steps=400, learning_rate=0.0, logging_steps=50)
    assert ours.said == []
    assert ours.steps_on > 300
    check_mean(ours.gradients[ours.drawn], uniform_mean(way in BY_COUNT), deviations=4)


@pytest.mark.parametrize("way", WAYS)
def test_switched_off_it_is_the_plain_trainers(way):
    check_switched_off(WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fresh", [False, True])
def test_until_the_weights_are_known_it_is_the_plain_trainers(way, fresh, monkeypatch):
    monkeypatch.setitem(METHODS_OF_SCRIPTS, "never", {"presample_ratio": 3.0, "tau_threshold": 2.8})
    script = WAYS[way]
    if fresh and way not in ("in the model", "of the step's count"):
        script = replace(script, model=lambda: Classifier(fresh=True))
    plain, ours = run(script, None, max_steps=40), run(script, "never", max_steps=40)
    same(ours, plain)
    assert ours.said == []
    assert ours.trainer._objective.weights.known


def one_rare():
    """One example of the last class among 96."""
    rows = points(400)
    return [row for row in rows if row["labels"] < 2][:95] + [row for row in rows if row["labels"] == 2][:1]


@pytest.mark.parametrize("way", ["overridden", "in the model"])
def test_it_goes_on_only_when_every_class_was_met(way):
    script = replace(WAYS[way], data=one_rare)
    met = []
    collate = lambda rows: met.append({int(row["labels"]) for row in rows}) or default_data_collator(rows)  # noqa: E731
    ours = run(replace(script, given={"data_collator": collate}), "presample", max_steps=60)
    plain = run(script, None, max_steps=60)
    first = ours.drawn.tolist().index(True)
    assert ours.said == [] and set.union(*met[:first]) == {0, 1, 2}
    assert torch.equal(ours.gradients[:first], plain.gradients[:first])


class Wide(Classifier):
    """Has a class that no example is of."""

    def __init__(self):
        super().__init__(torch.tensor([*RARE, 2.0]))
        self.layer = nn.Linear(FEATURES, CLASSES + 1)


def test_a_class_that_no_example_has_is_waited_for_for_an_epoch():
    ours = run(Script(model=Wide), "presample", max_steps=40)
    first = ours.drawn.tolist().index(True)
    assert ours.said == [] and EXAMPLES // BATCH < first < 2 * EXAMPLES // BATCH + 3


# ---- Off ----


def focal_loss(logits, labels):
    return focal({"logits": logits}, {"labels": labels}).mean()


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, weight=RARE, label_smoothing=0.1)


def after_ten(trainer, model, loss, logits, labels):
    return F.cross_entropy(logits, labels, weight=RARE if trainer.state.global_step < 10 else RARE.flip(0))


def with_a_term(logits, labels):
    return weighted(logits, labels) + 1e-2 * logits.logsumexp(-1).mean()


def with_a_constant(logits, labels):
    return weighted(logits, labels) + 0.1


class OfSamples(Classifier):
    """Weighs each example by a column."""

    def forward(self, x, weight=None, labels=None):
        outputs = {"logits": self.logits(x)}
        if labels is None:
            return outputs
        loss = weight * F.cross_entropy(outputs["logits"], labels, reduction="none")
        return {"loss": loss.sum() / weight.sum(), **outputs}


def weighing_at_random():
    return points(weight=lambda label: 0.5 + torch.rand(len(label), generator=torch.Generator().manual_seed(2)))


NO_CLASS_WEIGHTS = {
    "focal": Script(own_loss(focal_loss)),
    "focal, fresh": Script(own_loss(focal_loss), lambda: Classifier(fresh=True)),
    "smoothed": Script(own_loss(smoothed)),
    "a term": Script(own_loss(with_a_term)),
    "a constant": Script(own_loss(with_a_constant)),
    "of samples": Script(model=OfSamples, data=weighing_at_random),
}


@pytest.mark.parametrize("kind", NO_CLASS_WEIGHTS)
def test_what_is_no_class_weight_is_off(kind):
    check_off(NO_CLASS_WEIGHTS[kind], "the loss is another than the model's head says")


def test_weights_that_change_are_off_from_then_on():
    ours = run(Script(after_super(after_ten), below=True), "presample", max_steps=60)
    assert len(ours.said) == 1 and ours.drawn[5:10].any() and not ours.drawn[10 + 16 + 1 :].any()


# ---- Resuming ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 30))])
def test_a_resumed_run_is_the_same_run(method, at, tmp_path):
    settings = {"max_steps": 120, "save_strategy": "steps", "save_steps": at, "save_total_limit": 150}
    settings |= {"logging_steps": 60, "learning_rate": 1e-6}
    whole = make(WAYS["overridden"], method, tmp_path, **settings)
    whole.train()
    resumed, found = make(WAYS["overridden"], method, tmp_path, **settings), Gradients()
    found.trainer = resumed
    resumed.add_callback(found)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert sum(found.drawn) > 10
    assert torch.equal(flat(whole.model.parameters()), flat(resumed.model.parameters()))
    assert whole._objective.weights.state == resumed._objective.weights.state


# ---- Two ranks ----


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch([*ACCELERATE, "--multi_gpu", "--num_processes", "2"], "class_weights_ranks.py", folder, seconds=480)
    return results(folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in the model", "function", "overridden"])
def test_two_ranks_learn_the_same_weights_and_have_the_plain_trainers_mean(two, way):
    # Trainer multiplies the loss of a function by the number of ranks, whatever the function divides it by.
    expected = (2 if way == "function" else 1) * uniform_mean()
    plain = two[f"{way}, None"][0]
    check_mean(torch.tensor(plain["gradients"]), expected)
    for method in ("presample", "history"):
        first, second = two[f"{way}, {method}"]
        assert first["said"] == second["said"] == []
        assert first["steps_on"] == second["steps_on"] > 150
        own = [{k: v for k, v in one["weights"].items() if k != "recent"} for one in (first, second)]
        assert own[0] == own[1]
        check_mean(torch.tensor(first["gradients"])[torch.tensor(first["drawn"])], expected)


@pytest.mark.slow
def test_two_ranks_resume_to_the_last_bit(two):
    for whole, resumed in zip(two["whole"], two["resumed"], strict=True):
        assert whole["parameters"] == resumed["parameters"]
        assert whole["steps_on"] == resumed["steps_on"] > 20
        assert whole["weights"]["counts"] == resumed["weights"]["counts"]


# ---- The mathematics, by enumeration ----

SHARES = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def known(by_sum=True):
    state = WeightState(RARE.tolist(), [1.0] * CLASSES, 1.0, by_sum, not by_sum, known=True)
    return ClassWeights(state)


def expected(size):
    """What a uniform batch of independent draws gives each class, times its share."""
    found = torch.zeros(CLASSES, dtype=torch.float64)
    for labels in itertools.product(range(CLASSES), repeat=size):
        chance = math.prod(float(SHARES[label]) for label in labels)
        for label in labels:
            found[label] += chance * float(RARE[label]) / sum(float(RARE[other]) for other in labels)
    return found


@pytest.mark.parametrize(("pool", "size"), [(4, 2), (5, 2), (5, 3), (6, 6), (3, 1)])
def test_blocks_of_a_pool_are_uniform_batches(pool, size):
    found, weights = torch.zeros(CLASSES, dtype=torch.float64), known()
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(pool, generator=generator) for _ in range(3)])
    for drawn in itertools.product(range(CLASSES), repeat=pool):
        labels = torch.tensor(drawn)
        chance = math.prod(float(SHARES[label]) for label in drawn)
        counted = weights.in_blocks(labels, size, order).double()
        found.index_add_(0, labels, chance * counted / pool)
    torch.testing.assert_close(found, expected(size), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_average_is_that_of_uniform_batches(size):
    weights = known()
    weights.state.counts = (1000 * SHARES).tolist()
    found = SHARES * weights.on_average(torch.arange(CLASSES), size).double()
    torch.testing.assert_close(found, expected(size), rtol=1e-5, atol=1e-7)


def rows(labels, factors, batch=0, squares=None):
    squares = torch.ones(len(labels)) if squares is None else torch.tensor(squares)
    columns = [torch.tensor(labels), torch.tensor(factors) * squares, squares]
    return torch.stack([*columns, *(torch.full((len(labels),), float(v)) for v in (batch, 2e-3, CLASSES))], 1).double()


def batch_of(labels, batch=0):
    weight = RARE[torch.tensor(labels)]
    return rows(labels, (weight / weight.mean()).tolist(), batch)


def learnt(*batches):
    weights = ClassWeights()
    explained = [weights.learn(batch) for batch in batches]
    weights.settle(0, 100, True)
    return weights, explained[-1]


def test_weights_are_learnt_over_batches_with_a_class_in_common():
    weights, explained = learnt(batch_of([0, 0, 1]), batch_of([1, 2, 2]))
    assert explained and weights.known and weights.state.by_sum
    torch.testing.assert_close(weights.of(torch.arange(3)), RARE / RARE.max())


def test_batches_without_a_class_in_common_wait():
    weights, explained = learnt(batch_of([0, 1]), batch_of([2, 2]))
    assert explained and not weights.known


def test_batches_of_one_mixture_wait():
    weights, explained = learnt(batch_of([0, 1, 2]), batch_of([2, 1, 0]))
    assert explained and not weights.known


def test_two_factors_in_a_class_are_no_class_weights():
    assert learnt(rows([0, 0, 1], [1.0, 1.1, 0.9]))[1] is False
    assert learnt(batch_of([0, 1, 2]), rows([0, 1], [1.0, 1.0]))[1] is False


def test_a_class_that_is_too_well_fitted_to_tell_is_waited_for():
    fitted = rows([0, 1, 2], [0.5, 1.0, 0.0], squares=[1.0, 1.0, 0.0])
    weights, explained = learnt(fitted)
    assert explained and weights.learning and not weights.known
