"""The published methods: their formulas against twins, and real training by them."""

import math

import pytest
import reference
import torch
import toys

from hf_importance import ImportanceTrainer
from hf_importance.batches.entries import INDEX, WEIGHTS
from hf_importance.batches.random import key_to_seed
from hf_importance.samplers.published import (
    InfoBatch,
    OnlineBatchSelection,
    Prioritized,
    RhoLoss,
    SelectiveBackprop,
    draws,
    irreducible_losses,
    online_batch_selection,
    prioritized,
    selective_backprop,
)
from hf_importance.samplers.sampler import Scored

EXAMPLES, BATCH = 128, 16
STEPS = EXAMPLES // BATCH  # an epoch
METHODS = (OnlineBatchSelection, Prioritized)
LOSSES = torch.tensor([0.3, 2.0, 0.0, 0.7, 5.0, 1.1])


# ---- Formulas ----


@pytest.mark.parametrize("pressure", [1.0, 4.0, 1e8])
def test_rank_probabilities(pressure):
    found = online_batch_selection.relative_by_rank(LOSSES, pressure, torch.randperm(6))
    torch.testing.assert_close((found / 6).tolist(), reference.probabilities_by_rank(LOSSES.tolist(), pressure))
    assert float(found.max() / found.min()) == pytest.approx(pressure ** (5 / 6))


def test_unseen_ranks_first_and_ties_follow_the_order():
    losses = torch.tensor([1.0, torch.nan, 9.0, 1.0])
    found = online_batch_selection.relative_by_rank(losses, 16.0, torch.tensor([3, 2, 1, 0]))
    assert found.argsort(descending=True).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 2.0])
def test_priority_probabilities(exponent):
    losses = LOSSES.clone()
    losses[0] = torch.nan
    found = prioritized.relative_by_priority(losses, exponent) / 6
    slow = reference.probabilities_by_priority(losses.tolist(), exponent, prioritized.SMALLEST_LOSS)
    torch.testing.assert_close(found.tolist(), slow, rtol=1e-6, atol=0)


def test_priorities_of_nothing_seen_and_of_zeros_are_uniform():
    for losses in (torch.full((4,), torch.nan), torch.zeros(4)):
        assert prioritized.relative_by_priority(losses, 0.6).tolist() == [1.0] * 4


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_priority_weights(exponent):
    relative, drawn = prioritized.relative_by_priority(LOSSES, 0.6), [1, 1, 4, 3]
    found = prioritized.correction_weights(relative[drawn], exponent)
    slow = reference.priority_weights((relative / 6).tolist(), drawn, exponent)
    torch.testing.assert_close(found.tolist(), slow)
    assert found.max() == 1


def test_full_correction_is_unbiased_but_for_the_division_by_the_largest():
    # All outcomes of two draws, each step multiplied by its largest weight again.
    relative, values = prioritized.relative_by_priority(LOSSES[:4], 0.6), [1.0, 10.0, 100.0, 1000.0]
    probabilities = (relative / 4).tolist()
    total = 0.0
    for chance, drawn in reference.multinomial_outcomes(probabilities, 2):
        weights = prioritized.correction_weights(relative[drawn], 1.0).tolist()
        largest = max(1 / (4 * probabilities[i]) for i in drawn)
        total += chance * largest * sum(w * values[i] for w, i in zip(weights, drawn, strict=True)) / 2
    assert total == pytest.approx(sum(values) / 4)


def test_a_draw_with_replacement_has_the_probabilities(monkeypatch):
    # An even comb in place of random numbers: each example as often as it should be, exactly.
    relative = torch.tensor([0.5, 1.5, 0.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda size, **_: (torch.arange(size, dtype=torch.float64) + 0.5) / size)
    found = draws.draw_with_replacement(relative, 800, torch.Generator())
    assert torch.bincount(found, minlength=4).tolist() == [100, 300, 0, 400]


def pool_of(scores, own, seed=0, index=None):
    generator = torch.Generator().manual_seed(seed)
    size = len(scores)
    return Scored(scores.double(), index, own, own, torch.ones(size), (size,), generator=generator)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_selective_backprop_chooses_by_the_percentile(beta):
    # Chosen first come those that pass, in order; then those that came closest.
    sampler = SelectiveBackprop(beta=beta)
    sampler.begin(None)
    seen = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    sampler.learn(1.0, sampler.measure(pool_of(seen, 1)))
    sampler.learn(1.0, sampler.measure(pool_of(seen, 1)))
    losses = seen[:40].clone()
    edges = selective_backprop.EDGES.tolist()
    bins = lambda values: [sum(edge < value for edge in edges) for value in values.tolist()]  # noqa: E731
    mass = [0.0] * (len(edges) + 1)
    for place in bins(seen):
        mass[place] += 1 + sampler.momentum
    for place in bins(losses):
        mass[place] += 1
    chances = [(sum(mass[: place + 1]) / sum(mass)) ** beta for place in bins(losses)]
    drawn = torch.rand(40, generator=torch.Generator().manual_seed(7), dtype=torch.float64).tolist()
    passed = [i for i in range(40) if drawn[i] < chances[i]]
    others = sorted(set(range(40)) - set(passed), key=lambda i: drawn[i] / chances[i])
    for kept in (len(passed) - 2, len(passed) + 5):
        rows, weights = sampler.keep(pool_of(losses, kept, seed=7))
        assert rows.tolist() == (passed + others)[:kept] and weights.tolist() == [1.0] * kept


def test_selective_backprop_keeps_a_batch_of_its_pool_on_average():
    sampler = SelectiveBackprop(beta=2.0)
    sampler.begin(None)
    losses = torch.rand(3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampler.learn(1.0, sampler.measure(pool_of(losses, 1)))
    rows, _ = sampler.keep(pool_of(losses, 3000))
    # All rows, those that pass first: the first of the others breaks the order.
    passed = int((rows.diff() < 0).nonzero()[0]) + 1
    assert passed / 3000 == pytest.approx(1 / 3, abs=0.04)


def test_rho_loss_keeps_the_largest_reducible_losses():
    irreducible = torch.tensor([0.0, 5.0, 1.0, 0.5, 0.0, 2.0])
    losses, index = torch.tensor([1.0, 5.5, 4.0, 0.4]), torch.tensor([4, 1, 5, 3])
    rows, weights = RhoLoss(irreducible).keep(pool_of(losses, 2, index=index))
    twin = sorted(range(4), key=lambda i: -(float(losses[i]) - float(irreducible[index[i]])))[:2]
    assert rows.tolist() == twin == [2, 0] and weights.tolist() == [1.0, 1.0]


# ---- Training ----


class Look(ImportanceTrainer):
    """Keeps what each micro-batch is trained on: examples, weights, optimizer step."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in toys.handed(self, batches):
            row = (batch[INDEX].tolist(), batch.get(WEIGHTS), self.state.global_step)
            self.__dict__.setdefault("trained", []).append(row)
        return batches, items


def build(tmp_path, sampler, data=None, dropout=0.0, score=None, **overrides):
    settings = {"max_steps": 4 * STEPS, "logging_steps": 4, "presample_ratio": "auto", "tau_threshold": None}
    return Look(
        model=toys.bert(dropout),
        args=toys.arguments(tmp_path, **{**settings, **overrides}),
        train_dataset=toys.sentences(EXAMPLES) if data is None else data,
        sampler=sampler,
        compute_score_func=score,
    )


def losses_of(model, data):
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack(list(data["input_ids"]))).logits
    model.train()
    return torch.nn.functional.cross_entropy(logits, torch.as_tensor(data["labels"]), reduction="none")


def flat(lists):
    return [entry for some in lists for entry in some]


@pytest.mark.parametrize(
    ("kind", "accumulation", "redraw"), [(METHODS[0], 1, 1), (METHODS[1], 1, 3), (METHODS[1], 3, 2)]
)
def test_what_is_drawn_and_how_it_is_weighted(tmp_path, kind, accumulation, redraw):
    # Nothing is learnt, and what is found of an example is its label: twins say what every step is.
    data = toys.sentences(EXAMPLES).remove_columns("labels").add_column("labels", [i / 64 for i in range(EXAMPLES)])
    updates = math.ceil(STEPS / accumulation)
    trainer = Look(
        model=toys.bert(num_labels=1),
        args=toys.arguments(
            tmp_path,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
            max_steps=3 * updates,
            logging_steps=1,
        ),
        train_dataset=data.with_format("torch"),
        sampler=kind(redraw_every=redraw),
        compute_score_func=lambda outputs, labels: labels,
    )
    trainer.train()
    by_step = [[row for row in trainer.trained if row[2] == step] for step in range(3 * updates)]
    assert all(weights is None for micros in by_step[:updates] for _, weights, _ in micros)
    assert sorted(i for micros in by_step[:updates] for index, _, _ in micros for i in index) == list(range(EXAMPLES))
    with torch.no_grad():
        predicted = trainer.model(torch.stack(list(data.with_format("torch")["input_ids"]))).logits[:, 0]
    known = torch.tensor(data["labels"])
    losses, drawn, number = (predicted - known).square(), [], 0
    logged = [e for e in trainer.state.log_history if "loss" in e]
    for step in range(updates, 3 * updates):
        if not drawn:
            covered = range(step, min(step + redraw, (step // updates + 1) * updates))
            done = step / (3 * updates)
            generator = torch.Generator().manual_seed(key_to_seed(42, number, 6))
            if kind is Prioritized:
                chances = reference.probabilities_by_priority(known.tolist(), 0.6, prioritized.SMALLEST_LOSS)
            else:
                torch.randperm(EXAMPLES, generator=generator)
                chances = reference.probabilities_by_rank(known.tolist(), 100.0 ** (1 - done))
            sizes = [BATCH * len(by_step[later]) for later in covered]
            edges = torch.tensor(chances, dtype=torch.float64).cumsum(0).tolist()
            places = torch.rand(sum(sizes), generator=generator, dtype=torch.float64).tolist()
            drawn = list(torch.tensor([next(i for i, e in enumerate(edges) if e > p) for p in places]).split(sizes))
            number += 1
        index = drawn.pop(0).tolist()
        assert [i for micro, _, _ in by_step[step] for i in micro] == index, step
        found = torch.cat([weights for _, weights, _ in by_step[step]])
        beta = 0.4 + 0.6 * done
        ones = [1.0] * len(index)
        expected = reference.priority_weights(chances, index, beta) if kind is Prioritized else ones
        torch.testing.assert_close(found.tolist(), expected, rtol=1e-5, atol=0)
        assert logged[step]["loss"] == pytest.approx(float((found * losses[index]).mean()), rel=1e-4)


@pytest.mark.parametrize(("workers", "redraw", "accumulation"), [(0, 1, 1), (0, 3, 2), (2, 4, 1)])
def test_a_draw_knows_all_visits_before_it(tmp_path, monkeypatch, workers, redraw, accumulation):
    # What is found of an example is the step of the visit, so the table says when each was last seen.
    known, draw = [], prioritized.relative_by_priority
    monkeypatch.setattr(prioritized, "relative_by_priority", lambda t, e: (known.append(t.clone()), draw(t, e))[1])
    trainer = build(
        tmp_path,
        Prioritized(redraw_every=redraw),
        dataloader_num_workers=workers,
        gradient_accumulation_steps=accumulation,
        max_steps=3 * STEPS // accumulation,
        score=lambda outputs, labels: torch.full((len(labels),), 1.0 + trainer.state.global_step),
    )
    trainer.train()
    updates = STEPS // accumulation
    drawn = [step for step in range(updates, 3 * updates) if step % updates % redraw == 0]
    assert len(known) == len(drawn)
    for step, table in zip(drawn, known, strict=True):
        expected = torch.zeros(EXAMPLES)
        for index, _, visited in trainer.trained:
            if visited < step:
                expected[index] = 1.0 + visited
        # Weighted for the loss and back in float32.
        torch.testing.assert_close(table, expected, rtol=1e-6, atol=0, msg=str(step))


def test_recomputing_renews_every_loss(tmp_path, monkeypatch):
    calls, rank = [], online_batch_selection.relative_by_rank
    trainer = build(tmp_path, OnlineBatchSelection(recompute_every=5, redraw_every=3), dropout=0.1)

    def spy(table, pressure, order):
        calls.append((trainer.state.global_step, table.clone(), losses_of(trainer.model, trainer.train_dataset)))
        return rank(table, pressure, order)

    monkeypatch.setattr(online_batch_selection, "relative_by_rank", spy)
    trainer.train()
    # At multiples of 5; the draws before them are cut short, as are those before the epochs' ends at 16 and 24.
    assert [step for step, _, _ in calls] == [8, 10, 13, 15, 16, 19, 20, 23, 24, 25, 28, 30]
    for step, table, losses in calls:
        assert torch.allclose(table, losses, rtol=1e-5) == (step % 5 == 0), step
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert last["importance/examples_scored"] == 5 * EXAMPLES
    assert trainer.model.training


@pytest.mark.parametrize("kind", METHODS)
def test_it_learns_and_says_what_it_does(tmp_path, kind):
    trainer = build(tmp_path, kind())
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert logged[-1]["loss"] < 0.5 < logged[0]["loss"]
    assert [e["importance/active_share"] for e in logged] == [0.0] * 2 + [1.0] * 6
    assert logged[-1]["importance/tau"] > 1
    assert logged[-1]["importance/table_share"] == 1
    assert logged[-1]["importance/examples_trained"] == 4 * EXAMPLES > logged[-1]["importance/examples_distinct"]
    own, middle = ("selection_pressure", 10.0) if kind is METHODS[0] else ("correction_exponent", 0.7)
    assert [logged[i]["importance/" + own] for i in (3, 7)] == pytest.approx([middle, 1.0])
    assert "importance/gain" not in logged[-1]
    table = trainer.importance_table()
    assert sum(table["visits"][:]) == 4 * EXAMPLES
    if kind is METHODS[0]:
        assert sum(table["weight_sum"][:]) == 4 * EXAMPLES


def test_tau_is_that_of_the_dataset_not_of_what_is_drawn(tmp_path):
    # One class in four has ten times the loss. Of the examples drawn nearly all are of it, so that theirs is near 1.
    def score(outputs, labels):
        return 1.0 + 9.0 * (labels == 0).float()

    data = toys.sentences(EXAMPLES)
    expected = reference.tau([10.0 if label == 0 else 1.0 for label in data["labels"]])
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": STEPS, "max_steps": 16, "logging_steps": 1}
    for sampler in (OnlineBatchSelection(pressure=1e3, final_pressure=1e3), Prioritized(priority_exponent=1.5)):
        sampler.momentum = 0.0
        trainer = build(tmp_path, sampler, score=score, **settings)
        trainer.train()
        found = [e["importance/tau"] for e in trainer.state.log_history if "loss" in e][1:]
        assert sum(found) / 15 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("make", "at", "settings"),
    [
        (Prioritized, 5, {}),  # in the first epoch
        (lambda: Prioritized(redraw_every=5), 17, {}),  # in a draw
        (lambda: OnlineBatchSelection(redraw_every=2, recompute_every=10), 20, {}),  # before a recomputation
        (lambda: OnlineBatchSelection(redraw_every=4), 19, {"dataloader_num_workers": 2}),
        (lambda: Prioritized(redraw_every=3), 7, {"gradient_accumulation_steps": 3, "max_steps": 12}),
        (InfoBatch, 17, {}),
        (SelectiveBackprop, 17, {"dataloader_num_workers": 2}),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, make, at, settings):
    settings = {"save_strategy": "steps", "save_steps": at, "logging_steps": 1, "dropout": 0.1, **settings}
    if make is SelectiveBackprop:
        settings["max_steps"] = 24
    whole = build(tmp_path / "whole", make(), **settings)
    kind = Look if make is not SelectiveBackprop else ImportanceTrainer
    whole.__class__ = kind  # only those that remember have indices to look at
    whole.train()
    resumed = build(tmp_path / "resumed", make(), **settings)
    resumed.__class__ = kind
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    if kind is Look:
        tail = len(resumed.trained)
        assert [row[0] for row in whole.trained[-tail:]] == [row[0] for row in resumed.trained]
    timeless = lambda e: {k: v for k, v in e.items() if not k.endswith(("time_share", "_runtime", "_per_second"))}  # noqa: E731
    histories = [[timeless(e) for e in t.state.log_history if "train_loss" not in e] for t in (whole, resumed)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("before", ["history", "presample"])
def test_another_methods_table_is_not_taken_up(tmp_path, before, caplog):
    settings = {"save_strategy": "steps", "save_steps": 10, "max_steps": 10}
    score = lambda outputs, labels: torch.full((len(labels),), 7.0)  # noqa: E731
    toys.run(
        ImportanceTrainer,
        toys.bert(),
        toys.arguments(tmp_path, importance_method=before, **settings),
        toys.sentences(EXAMPLES),
        compute_score_func=score,
    )
    resumed = build(tmp_path, Prioritized(), save_strategy="no", max_steps=13)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "sampler was" in caplog.text
    assert 7.0 not in resumed.importance_table()["score"][:]
    assert resumed.sampler.active


def test_info_batch_leaves_out_well_learned_examples_and_weighs_up_the_others(tmp_path):
    # Nothing is learnt, so the last losses are those of the model; 104 examples make ragged batches of 6 1/2.
    data = toys.sentences(104)
    trainer = build(tmp_path, InfoBatch(prune=0.4, annealing=0.7), data, learning_rate=0.0, max_steps=28)
    trainer.train()
    losses = losses_of(trainer.model, data)
    learned = {i for i, loss in enumerate(losses.tolist()) if loss < float(losses.mean())}
    epochs = [[row for row in trainer.trained if row[2] // 7 == epoch] for epoch in range(4)]
    for epoch in (0, 3):  # the first, and the annealed one
        assert sorted(flat(index for index, _, _ in epochs[epoch])) == list(range(104))
        assert all(weights is None for _, weights, _ in epochs[epoch])
    left_out = []
    for epoch in (1, 2):
        visited = flat(index for index, _, _ in epochs[epoch])
        weights = torch.cat([weights for _, weights, _ in epochs[epoch]]).tolist()
        assert len(epochs[epoch]) == 7 and len(set(visited)) == len(visited)
        assert set(range(104)) - learned <= set(visited)
        scale = len(visited) / 104
        for i, weight in zip(visited, weights, strict=True):
            assert weight == pytest.approx(scale / 0.6 if i in learned else scale)
        left_out.append(learned - set(visited))
    assert left_out[0] != left_out[1]
    assert 0.2 < len(left_out[0]) / len(learned) < 0.6


@pytest.mark.parametrize("examples", [64, 53])  # a last batch that is not whole
def test_irreducible_losses_are_those_of_the_reference_model(tmp_path, examples):
    data = toys.sentences(examples)
    reference_trainer = toys.run(ImportanceTrainer, toys.bert(0.3), toys.arguments(tmp_path), toys.sentences(64))
    reference_trainer.model.train()
    found = irreducible_losses(reference_trainer, data)
    assert reference_trainer.model.training
    torch.testing.assert_close(found, losses_of(reference_trainer.model, data))


def test_rho_loss_trains_on_what_the_reference_model_finds_easy(tmp_path):
    # Half of the training set has wrong labels. The reference model knows better; without it they are all there is.
    data = toys.sentences(EXAMPLES)
    labels = [(int(label) + (i % 2)) % 4 for i, label in enumerate(data["labels"])]
    wrong = data.remove_columns("labels").add_column("labels", labels).with_format("torch")
    args = toys.arguments(tmp_path, max_steps=60, importance_sampling=False)
    reference_trainer = toys.run(ImportanceTrainer, toys.bert(), args, toys.sentences(EXAMPLES, seed=1))
    share = {}
    for name, irreducible in (("rho", irreducible_losses(reference_trainer, wrong)), ("loss", torch.zeros(EXAMPLES))):
        trainer = build(tmp_path, RhoLoss(irreducible, ratio=4), wrong, max_steps=40)
        trainer.__class__ = ImportanceTrainer  # pools hand on no indices to look at
        trainer.train()
        visits = trainer.importance_table()["visits"][:]
        assert sum(visits) == 40 * BATCH
        share[name] = sum(visits[1::2]) / sum(visits)
    assert share["rho"] < 0.15 and share["loss"] > 0.4


# ---- What is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnlineBatchSelection(pressure=0.5), "pressure must be a finite number of at least 1, but it is 0.5"),
        (lambda: OnlineBatchSelection(final_pressure=math.inf), "final_pressure must be a finite number .* it is inf"),
        (lambda: Prioritized(priority_exponent=-1.0), "priority_exponent must be a finite number of at least 0"),
        (lambda: Prioritized(correction_exponent=1.1), r"correction_exponent must be a number in \[0, 1\]"),
        (lambda: Prioritized(redraw_every=0), "redraw_every must be at least 1 optimizer step, .* it is 0"),
        (lambda: OnlineBatchSelection(recompute_every=2.5), "recompute_every must be at least 1 .* it is 2.5"),
        (lambda: SelectiveBackprop(beta=0.0), "beta must be a finite number above 0"),
        (lambda: SelectiveBackprop(momentum=1.0), r"momentum must be a number in \[0, 1\)"),
        (lambda: InfoBatch(prune=1.0), r"prune must be a number in \[0, 1\)"),
        (lambda: InfoBatch(annealing=2.0), r"annealing must be a number in \[0, 1\]"),
        (lambda: RhoLoss(torch.rand(4), ratio=1.0), "ratio must be a finite number above 1"),
        (lambda: RhoLoss([1.0, 2.0]), "irreducible must be a tensor"),
        (lambda: RhoLoss(torch.tensor([1.0, torch.nan])), "irreducible must be a tensor with one finite loss"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [*METHODS, InfoBatch, lambda: RhoLoss(torch.rand(EXAMPLES))])
def test_data_that_does_not_fit_is_refused(tmp_path, make):
    name = type(make()).__name__
    stream = toys.sentences(EXAMPLES).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"{name} remembers .* must be map-style"):
        build(tmp_path, make(), stream).train()
    with pytest.raises(ValueError, match=f"{name} draws its own order"):
        build(tmp_path, make(), train_sampling_strategy="group_by_length").train()


def test_losses_of_another_dataset_are_refused(tmp_path):
    with pytest.raises(ValueError, match="irreducible has 5 losses, and train_dataset 128 examples"):
        build(tmp_path, RhoLoss(torch.rand(5))).train()
