"""Online batch selection and prioritized sampling: their formulas against twins, and real training by them."""

import math

import pytest
import reference
import torch
import toys

from hf_importance import ImportanceTrainer, baselines
from hf_importance.batches import key_to_seed
from hf_importance.visits import INDEX

EXAMPLES, BATCH = 128, 16
STEPS = EXAMPLES // BATCH  # an epoch
METHODS = ("online_batch_selection", "prioritized")
LOSSES = torch.tensor([0.3, 2.0, 0.0, 0.7, 5.0, 1.1])


# ---- Formulas ----


@pytest.mark.parametrize("pressure", [1.0, 4.0, 1e8])
def test_rank_probabilities(pressure):
    found = baselines.relative_by_rank(LOSSES, pressure, torch.randperm(6))
    torch.testing.assert_close((found / 6).tolist(), reference.probabilities_by_rank(LOSSES.tolist(), pressure))
    assert float(found.max() / found.min()) == pytest.approx(pressure ** (5 / 6))


def test_unseen_ranks_first_and_ties_follow_the_order():
    losses = torch.tensor([1.0, torch.nan, 9.0, 1.0])
    found = baselines.relative_by_rank(losses, 16.0, torch.tensor([3, 2, 1, 0]))
    assert found.argsort(descending=True).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 2.0])
def test_priority_probabilities(exponent):
    losses = LOSSES.clone()
    losses[0] = torch.nan
    found = baselines.relative_by_priority(losses, exponent) / 6
    slow = reference.probabilities_by_priority(losses.tolist(), exponent, baselines.SMALLEST_LOSS)
    torch.testing.assert_close(found.tolist(), slow, rtol=1e-6, atol=0)


def test_priorities_of_nothing_seen_and_of_zeros_are_uniform():
    for losses in (torch.full((4,), torch.nan), torch.zeros(4)):
        assert baselines.relative_by_priority(losses, 0.6).tolist() == [1.0] * 4


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_priority_weights(exponent):
    relative, drawn = baselines.relative_by_priority(LOSSES, 0.6), [1, 1, 4, 3]
    found = baselines.correction_weights(relative[drawn], exponent)
    slow = reference.priority_weights((relative / 6).tolist(), drawn, exponent)
    torch.testing.assert_close(found.tolist(), slow)
    assert found.max() == 1


def test_full_correction_is_unbiased_but_for_the_division_by_the_largest():
    # All outcomes of two draws, each step multiplied by its largest weight again.
    relative, values = baselines.relative_by_priority(LOSSES[:4], 0.6), [1.0, 10.0, 100.0, 1000.0]
    probabilities = (relative / 4).tolist()
    total = 0.0
    for chance, drawn in reference.multinomial_outcomes(probabilities, 2):
        weights = baselines.correction_weights(relative[drawn], 1.0).tolist()
        largest = max(1 / (4 * probabilities[i]) for i in drawn)
        total += chance * largest * sum(w * values[i] for w, i in zip(weights, drawn, strict=True)) / 2
    assert total == pytest.approx(sum(values) / 4)


def test_a_draw_with_replacement_has_the_probabilities(monkeypatch):
    # An even comb in place of random numbers: each example as often as it should be, exactly.
    relative = torch.tensor([0.5, 1.5, 0.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda size, **_: (torch.arange(size, dtype=torch.float64) + 0.5) / size)
    found = baselines.draw_with_replacement(relative, 800, torch.Generator())
    assert torch.bincount(found, minlength=4).tolist() == [100, 300, 0, 400]


def test_schedules():
    assert [baselines.selection_pressure(1e4, 1e2, p) for p in (0, 0.5, 1)] == pytest.approx([1e4, 1e3, 1e2])
    assert [baselines.annealed(0.4, p) for p in (0, 0.5, 1)] == pytest.approx([0.4, 0.7, 1.0])


# ---- Training ----


def arguments(tmp_path, method, **overrides):
    settings = {"importance_method": method, "importance_score": "loss", "max_steps": 4 * STEPS, "logging_steps": 4}
    return toys.arguments(tmp_path, **{**settings, **overrides})


class Look(ImportanceTrainer):
    """Keeps what each micro-batch is trained on: examples, weights, optimizer step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            given = inputs.get("importance_weights")
            row = (inputs[INDEX].tolist(), None if given is None else given.clone(), self.state.global_step)
            self.__dict__.setdefault("trained", []).append(row)
        return super().compute_loss(model, inputs, *args, **kwargs)


def build(tmp_path, method, data=None, dropout=0.0, score=None, **overrides):
    return Look(
        model=toys.bert(dropout),
        args=arguments(tmp_path, method, **overrides),
        train_dataset=toys.sentences(EXAMPLES) if data is None else data,
        compute_score_func=score,
    )


def losses_of(model, data):
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack(list(data["input_ids"]))).logits
    model.train()
    return torch.nn.functional.cross_entropy(logits, torch.as_tensor(data["labels"]), reduction="none")


@pytest.mark.parametrize(
    ("method", "accumulation", "redraw"), [(METHODS[0], 1, 1), (METHODS[1], 1, 3), (METHODS[1], 3, 2)]
)
def test_what_is_drawn_and_how_it_is_weighted(tmp_path, method, accumulation, redraw):
    # Nothing is learnt, and what is found of an example is its label: twins say what every step is.
    data = toys.sentences(EXAMPLES).remove_columns("labels").add_column("labels", [i / 64 for i in range(EXAMPLES)])
    updates = math.ceil(STEPS / accumulation)
    trainer = Look(
        model=toys.bert(num_labels=1),
        args=arguments(
            tmp_path,
            method,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
            redraw_every=redraw,
            max_steps=3 * updates,
            logging_steps=1,
        ),
        train_dataset=data.with_format("torch"),
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
            if method == "prioritized":
                chances = reference.probabilities_by_priority(known.tolist(), 0.6, baselines.SMALLEST_LOSS)
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
        expected = reference.priority_weights(chances, index, beta) if method == "prioritized" else ones
        torch.testing.assert_close(found.tolist(), expected, rtol=1e-5, atol=0)
        assert logged[step]["loss"] == pytest.approx(float((found * losses[index]).mean()), rel=1e-4)


@pytest.mark.parametrize(("workers", "redraw", "accumulation"), [(0, 1, 1), (0, 3, 2), (2, 4, 1)])
def test_a_draw_knows_all_visits_before_it(tmp_path, monkeypatch, workers, redraw, accumulation):
    # What is found of an example is the step of the visit, so the table says when each was last seen.
    known, draw = [], baselines.relative_by_priority
    monkeypatch.setattr(baselines, "relative_by_priority", lambda t, e: (known.append(t.clone()), draw(t, e))[1])
    trainer = build(
        tmp_path,
        "prioritized",
        dataloader_num_workers=workers,
        redraw_every=redraw,
        gradient_accumulation_steps=accumulation,
        max_steps=3 * STEPS // accumulation,
        score=lambda outputs, labels: torch.full((len(labels),), 1.0 + trainer.state.global_step),
    )
    trainer.train()
    updates = STEPS // accumulation
    draws = [step for step in range(updates, 3 * updates) if step % updates % redraw == 0]
    assert len(known) == len(draws)
    for step, table in zip(draws, known, strict=True):
        expected = torch.zeros(EXAMPLES)
        for index, _, visited in trainer.trained:
            if visited < step:
                expected[index] = 1.0 + visited
        # Weighted for the loss and back in float32.
        torch.testing.assert_close(table, expected, rtol=1e-6, atol=0, msg=str(step))


def test_recomputing_renews_every_loss(tmp_path, monkeypatch):
    calls, rank = [], baselines.relative_by_rank
    trainer = build(tmp_path, "online_batch_selection", dropout=0.1, recompute_every=5, redraw_every=3)

    def spy(table, pressure, order):
        calls.append((trainer.state.global_step, table.clone(), losses_of(trainer.model, trainer.train_dataset)))
        return rank(table, pressure, order)

    monkeypatch.setattr(baselines, "relative_by_rank", spy)
    trainer.train()
    # At multiples of 5; the draws before them are cut short, as are those before the epochs' ends at 16 and 24.
    assert [step for step, _, _ in calls] == [8, 10, 13, 15, 16, 19, 20, 23, 24, 25, 28, 30]
    for step, table, losses in calls:
        assert torch.allclose(table, losses, rtol=1e-5) == (step % 5 == 0), step
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert last["importance/examples_scored"] == 5 * EXAMPLES
    assert trainer.model.training


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_says_what_it_does(tmp_path, method):
    trainer = build(tmp_path, method)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert logged[-1]["loss"] < 0.5 < logged[0]["loss"]
    assert [e["importance/active_share"] for e in logged] == [0.0] * 2 + [1.0] * 6
    assert logged[-1]["importance/tau"] > 1
    assert logged[-1]["importance/table_share"] == 1
    assert logged[-1]["importance/examples_trained"] == 4 * EXAMPLES > logged[-1]["importance/examples_distinct"]
    own = "selection_pressure" if method == METHODS[0] else "correction_exponent"
    assert logged[-1]["importance/" + own] == pytest.approx(1.0)
    assert "importance/gain" not in logged[-1]
    table = trainer.importance_table()
    assert sum(table["visits"][:]) == 4 * EXAMPLES
    if method == METHODS[0]:
        assert sum(table["weight_sum"][:]) == 4 * EXAMPLES


def test_tau_is_that_of_the_dataset_not_of_what_is_drawn(tmp_path):
    # One class in four has ten times the loss. Of the examples drawn nearly all are of it, so that theirs is near 1.
    def score(outputs, labels):
        return 1.0 + 9.0 * (labels == 0).float()

    data = toys.sentences(EXAMPLES)
    expected = reference.tau([10.0 if label == 0 else 1.0 for label in data["labels"]])
    settings = {"learning_rate": 0.0, "tau_momentum": 0.0, "gradient_accumulation_steps": STEPS, "max_steps": 16}
    for method in METHODS:
        pressure = {"selection_pressure": 1e3, "final_selection_pressure": 1e3, "priority_exponent": 1.5}
        trainer = build(tmp_path, method, score=score, logging_steps=1, **pressure, **settings)
        trainer.train()
        found = [e["importance/tau"] for e in trainer.state.log_history if "loss" in e][1:]
        assert sum(found) / 15 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("method", "at", "settings"),
    [
        ("prioritized", 5, {}),  # in the first epoch
        ("prioritized", 17, {"redraw_every": 5}),  # in a draw
        ("online_batch_selection", 20, {"redraw_every": 2, "recompute_every": 10}),  # before a recomputation
        ("online_batch_selection", 19, {"redraw_every": 4, "dataloader_num_workers": 2}),
        ("prioritized", 7, {"gradient_accumulation_steps": 3, "max_steps": 12, "redraw_every": 3}),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, method, at, settings):
    settings = {"save_strategy": "steps", "save_steps": at, "logging_steps": 1, "dropout": 0.1, **settings}
    whole = build(tmp_path / "whole", method, **settings)
    whole.train()
    resumed = build(tmp_path / "resumed", method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
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
    resumed = build(tmp_path, "prioritized", save_strategy="no", max_steps=13)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "importance_method was" in caplog.text
    assert 7.0 not in resumed.importance_table()["score"][:]
    assert resumed._switch.active


# ---- What is refused ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"importance_score": "upper_bound"}, "draws by the loss, .*'upper_bound'. Pass importance_score='loss'"),
        ({"importance_budget": "constant_variance"}, "importance_budget='constant_variance' has no meaning with"),
        ({"weight_exponent": 0.5}, "weight_exponent=0.5 has no meaning with"),
        ({"learning_rate_scaling": "sqrt"}, "learning_rate_scaling='sqrt' has no meaning with"),
        ({"batch_norm": "running"}, "batch_norm='running' takes its running statistics from scored pools"),
        ({"selection_pressure": 0.5}, "selection_pressure must be a finite number of at least 1, but it is 0.5"),
        ({"final_selection_pressure": math.inf}, "final_selection_pressure must be a finite number .* it is inf"),
        ({"priority_exponent": -1.0}, "priority_exponent must be a finite number of at least 0, but it is -1.0"),
        ({"correction_exponent": 1.1}, "correction_exponent must be a number from 0 to 1, but it is 1.1"),
        ({"redraw_every": 0}, "redraw_every must be at least 1 optimizer step, but it is 0"),
        ({"recompute_every": 0}, "recompute_every must be at least 1 optimizer step, but it is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, method, overrides, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, method, **overrides)


def test_recomputing_belongs_to_one_method(tmp_path):
    with pytest.raises(ValueError, match="recompute_every=5 belongs to importance_method='online_batch_selection'"):
        arguments(tmp_path, "prioritized", recompute_every=5)


@pytest.mark.parametrize("method", METHODS)
def test_data_that_does_not_fit_is_refused(tmp_path, method):
    stream = toys.sentences(EXAMPLES).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"importance_method='{method}' remembers .* must be map-style"):
        build(tmp_path, method, stream).train()
    with pytest.raises(ValueError, match=f"importance_method='{method}' draws its own order"):
        build(tmp_path, method, train_sampling_strategy="group_by_length").train()


def test_workers_that_start_at_every_step_are_warned_of(tmp_path, caplog):
    build(tmp_path, "prioritized", dataloader_num_workers=2)
    assert "each draw starts dataloader_num_workers=2 processes anew" in caplog.text
