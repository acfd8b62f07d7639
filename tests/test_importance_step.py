"""An importance step is Algorithm 1: pool, one scoring pass, resampling, weights, weighted loss, τ, and off again."""

import itertools
import logging

import pytest
import reference
import torch
import toys

from hf_importance import ImportanceTrainer
from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.heads.tasks import ClassificationHead
from hf_importance.objective.scorer import evaluation_mode
from hf_importance.theory.sampling import inclusion_probabilities


class Spy:
    """A score function that keeps what it saw; the scores are ``make(step_of_call, labels)``."""

    def __init__(self, make):
        self.make, self.sizes, self.modes = make, [], []
        self.model = None

    def __call__(self, outputs, labels):
        self.sizes.append(len(labels))
        self.modes.append((self.model.training, torch.is_grad_enabled()))
        return self.make(len(self.sizes), labels)


def spied(tmp_path, make, model, dataset, **overrides):
    spy = Spy(make)
    spy.model = model
    trainer = toys.run(
        ImportanceTrainer, model, toys.always_on(tmp_path, **overrides), dataset, compute_score_func=spy
    )
    return trainer, spy


def uneven(_, labels):
    return 1.0 + torch.arange(len(labels)) % 3


@pytest.mark.parametrize(
    ("ratio", "scoring_batch_size", "expected"),
    [(3.0, None, [16, 16, 16]), (2.5, None, [16, 12, 12]), (3.0, 20, [16, 16, 16]), (1.25, None, [16, 4])],
)
def test_own_batch_and_reserve_are_scored_once(tmp_path, digits, ratio, scoring_batch_size, expected):
    model = toys.vit(dropout=0.3)
    trainer, spy = spied(
        tmp_path,
        uneven,
        model,
        digits.select(range(128)),
        presample_ratio=ratio,
        scoring_batch_size=scoring_batch_size,
        max_steps=3,
        logging_steps=3,
    )
    # Step 1 is uniform, and scored from the logits of its own training pass; 2 and 3 score a pool each, and what is
    # kept of it from its training pass.
    assert spy.sizes == [16, *expected, 16, *expected, 16]
    pool = [(False, False)] * len(expected)
    assert spy.modes == [(True, False), *pool, (True, False), *pool, (True, False)]
    assert model.training
    entry = trainer.state.log_history[-2]
    assert entry["importance/examples_scored"] == 2 * sum(expected)
    assert entry["importance/examples_trained"] == 3 * 16


def test_while_off_there_is_no_forward_pass_more(tmp_path, digits):
    model, calls = toys.vit(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    toys.run(ImportanceTrainer, model, toys.arguments(tmp_path, tau_threshold=3.9), digits.select(range(100)))
    assert len(calls) == 8


def test_it_goes_off_again_and_every_switch_is_logged(tmp_path, digits, caplog):
    # Call 1 (step 1, uniform): uneven. Then pools of three scored batches: uneven for two steps, equal afterwards.
    def make(call, labels):
        return uneven(call, labels) if call <= 7 else torch.ones(len(labels))

    with caplog.at_level(logging.INFO, "hf_importance"):
        trainer, _ = spied(tmp_path, make, toys.vit(), digits.select(range(128)), max_steps=6, logging_steps=1)
    history = trainer.state.log_history
    # A switch has no entry of its own: the training log says it.
    entries = [e for e in history if "loss" in e]
    assert [e for e in history if "importance/active" in e] == entries
    assert [(e["importance/active"], e["importance/switches"], e["importance/switched_at"]) for e in entries] == [
        *[(1.0, 1, 1)] * 3,
        *[(0.0, 2, 4)] * 3,
    ]
    assert [e["importance/active_share"] for e in entries] == [0, 1, 1, 1, 0, 0]
    lines = [record.getMessage() for record in caplog.records if "Importance sampling o" in record.getMessage()]
    assert len(lines) == 2
    assert "on after step 1: tau 1.0" in lines[0]
    assert "threshold 1.000" in lines[0]
    assert "off after step 4" in lines[1]


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_what_is_trained_on_is_weighted_as_drawn(tmp_path, digits, resampling):
    seen = []

    class Look(ImportanceTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            assert not inputs.keys() & {"importance_weights", "importance_index"}
            seen.append(toys.given(self).get("importance_weights"))
            return super().training_step(model, inputs, *args, **kwargs)

    args = toys.always_on(tmp_path, resampling=resampling, max_steps=4, logging_steps=4)
    trainer = toys.run(Look, toys.vit(), args, digits.select(range(128)))
    assert seen[0] is None
    weights = torch.stack(seen[1:])
    assert weights.shape == (3, 16)
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["importance/max_weight"] == pytest.approx(max(1.0, float(weights.max())))
    sizes = [16.0] + [float(w.sum() ** 2 / w.square().sum()) for w in weights]
    assert entry["importance/effective_sample_size"] == pytest.approx(sum(sizes) / 4, rel=1e-5)
    assert entry["importance/examples_distinct"] == 64 if resampling == "systematic" else 64 > 0


def test_the_weighted_gradient_is_unbiased_over_every_outcome(tmp_path):
    # A real model in float64, a pool of 5, 2 kept: expectation over all orders, offsets and draws, by enumeration.
    model = toys.bert().double()
    trainer = ImportanceTrainer(model=model, args=toys.arguments(tmp_path), train_dataset=toys.sentences())
    pool = toys.sentences(seed=3)[:5]
    head = ClassificationHead("single_label_classification", 4, 0.0)
    scores = head.upper_bound(model(**{k: v for k, v in pool.items() if k != "labels"}), pool).double()

    def gradient(index, weights):
        batch = {name: value[index] for name, value in pool.items()}
        model.zero_grad()
        loss = trainer.compute_loss(model.train(), {**batch, "importance_weights": weights})
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    every = torch.arange(5)
    expected = gradient(every, torch.ones(5, dtype=torch.float64))
    alone = torch.stack([gradient(every[i : i + 1], torch.ones(1, dtype=torch.float64)) for i in range(5)])
    torch.testing.assert_close(alone.mean(0), expected, rtol=1e-5, atol=1e-8)

    pi = inclusion_probabilities(scores, 2)
    g = scores / scores.sum()
    kinds = {
        "systematic": (
            [
                (p / 120, drawn)
                for order in itertools.permutations(range(5))
                for p, drawn in reference.systematic_outcomes(pi.tolist(), list(order))
            ],
            2 / (5 * pi),
        ),
        "multinomial": (reference.multinomial_outcomes(g.tolist(), 2), 1 / (5 * g)),
    }
    for outcomes, weight in kinds.values():
        mean = sum(p * (weight[drawn, None] * alone[drawn]).mean(0) for p, drawn in outcomes)
        torch.testing.assert_close(mean, alone.mean(0), rtol=0, atol=1e-12)
        # And the trainer's own gradient of an outcome is that combination.
        _, drawn = outcomes[len(outcomes) // 2]
        found = gradient(torch.tensor(drawn), weight[drawn])
        torch.testing.assert_close(found, (weight[drawn, None] * alone[drawn]).mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"importance_score": "loss"}, {"score": "gradient_norm"}])
def test_every_score_trains(tmp_path, digits, settings):
    args = toys.always_on(tmp_path, max_steps=3, logging_steps=3, **settings)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["importance/active_share"] == pytest.approx(2 / 3)
    assert entry["importance/max_weight"] > 1


def test_gradient_norm_is_the_norm_over_all_trainable_parameters(digits):
    model = toys.vit(dropout=0.2)
    model.classifier.bias.requires_grad_(False)
    batch = digits[:6]
    head = ClassificationHead("single_label_classification", 10, 0.0)
    found = toys.score_pool(model, PooledBatches([batch], Padding()), head, "gradient_norm")
    model.eval()
    for i in range(6):
        model.zero_grad()
        model(pixel_values=batch["pixel_values"][i : i + 1], labels=batch["labels"][i : i + 1]).loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert float(found[i]) == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-4)


def test_scoring_restores_each_modules_mode_and_moves_no_statistics(digits):
    model = toys.resnet().train()
    frozen = model.resnet.embedder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = ClassificationHead("single_label_classification", 10, 0.0)
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    found = toys.score_pool(model, PooledBatches([digits[:8]], Padding()), head, "upper_bound")
    assert not found.requires_grad
    assert not frozen.training
    assert model.training
    assert model.resnet.encoder.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_scripted_module_scores_without_dropout_too():
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Dropout(0.5)), torch.nn.Dropout(0.5))
    inputs = torch.ones(64)
    with evaluation_mode(model):
        assert torch.equal(model(inputs), inputs)
    assert model[0].training
    assert not torch.equal(model[0](inputs), inputs)
    assert not torch.equal(model[1](inputs), inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_score_trains_uniformly_is_counted_and_warned_about_once(tmp_path, digits, caplog, bad):
    def make(call, labels):
        scores = uneven(call, labels)
        if call in (3, 6):  # in the pools of steps 2 and 3
            scores[2] = bad
        return scores

    with caplog.at_level(logging.WARNING, "hf_importance"):
        trainer, _ = spied(tmp_path, make, toys.vit(), digits.select(range(128)), max_steps=4, logging_steps=1)
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["importance/nonfinite_steps"] for e in entries] == [0, 1, 2, 2]
    assert [e["importance/max_weight"] > 1 for e in entries] == [False, False, False, True]
    assert sum("NaN or infinite" in record.getMessage() for record in caplog.records) == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_all_scores_zero_is_uniform(tmp_path, digits):
    def make(call, labels):
        return uneven(call, labels) if call == 1 else torch.zeros(len(labels))

    trainer, _ = spied(tmp_path, make, toys.vit(), digits.select(range(128)), max_steps=2, logging_steps=1)
    entry = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert entry["importance/active_share"] == 1.0
    assert entry["importance/max_weight"] == pytest.approx(1)
    assert entry["importance/tau"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_are_the_same_run_and_another_seed_is_another(tmp_path, digits, workers):
    data = toys.Augmented(digits.select(range(128)))

    def parameters(**overrides):
        args = toys.always_on(tmp_path, dataloader_num_workers=workers, max_steps=5, **overrides)
        trainer = toys.run(ImportanceTrainer, toys.vit(dropout=0.1), args, data)
        return torch.cat([p.flatten() for p in trainer.model.parameters()])

    assert torch.equal(parameters(), parameters())
    assert not torch.equal(parameters(), parameters(seed=43))


def test_several_train_calls_start_afresh(tmp_path, digits):
    args = toys.always_on(tmp_path, max_steps=3, logging_steps=1)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["importance/active_share"] for e in entries] == [0, 1, 1]
    assert entries[-1]["importance/examples_trained"] == 48


def test_a_stream_is_its_own_reserve(tmp_path, digits):
    stream = digits.select(range(128)).to_iterable_dataset()
    trainer, spy = spied(tmp_path, uneven, toys.vit(), stream, max_steps=3, logging_steps=3)
    assert spy.sizes == [16] * 9
    assert trainer.state.global_step == 3
