"""The laws that an accelerator could break, on a GPU where there is one and on the CPU in any case.

A GPU is another place: scores must come to the host and weights go to the device, in other precisions, by kernels that
add in another order, and nothing may wait for it without need.
"""

import sys

import pytest
import reference
import torch
import toys
from test_examples import EXAMPLES
from transformers import Trainer

from hf_importance import ImportanceTrainer, Presample
from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.theory.sampling import inclusion_probabilities

sys.path.append(str(EXAMPLES))
import gpu

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
on_both = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Have kernels add in one order, or no two runs are the same; and one GPU, or the Trainer takes all of them."""
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs are visible, of which the Trainer would take all: CUDA_VISIBLE_DEVICES=0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def model(**config):
    return toys.bert(attn_implementation="eager", **config)


def build(tmp_path, device, kind=ImportanceTrainer, always=True, dropout=0.1, callbacks=None, **options):
    make = toys.always_on if always else toys.arguments
    args = make(tmp_path, use_cpu=device == "cpu", **options)
    return kind(model=model(dropout=dropout), args=args, train_dataset=toys.sentences(128), callbacks=callbacks)


@on_both
@pytest.mark.parametrize("bf16", [False, True])
def test_off_is_the_plain_run_to_the_last_bit(tmp_path, device, bf16):
    trainers = []
    for kind in (ImportanceTrainer, Trainer):
        trainers.append(build(tmp_path, device, kind, always=False, tau_threshold=3.99, bf16=bf16))
        trainers[-1].train()
        assert next(trainers[-1].model.parameters()).device.type == device
    toys.same_run(*trainers)
    assert trainers[0].state.log_history[-1]["importance/steps_on"] == 0


@pytest.mark.parametrize("device", [CUDA])
def test_off_adds_no_wait_and_on_adds_one(tmp_path, device):
    # On a CPU nothing waits, so there is nothing that the profiler could count.
    waits = {}
    for name, kind, options in (
        ("plain", Trainer, {"always": False}),
        ("off", ImportanceTrainer, {"always": False, "tau_threshold": 3.99}),
        ("on", ImportanceTrainer, {}),
    ):
        profiled = gpu.Profiled(steps=4)
        build(tmp_path, device, kind, callbacks=[profiled], max_steps=9, logging_steps=100, **options).train()
        # The profiler's own, of its end, is in all three.
        waits[name] = sum(profiled.counts[call] for call in gpu.WAITS if call.startswith("cuda"))
    assert waits["plain"] > 0
    assert waits["off"] == waits["plain"]
    assert waits["on"] <= waits["plain"] + 1


@on_both
def test_the_mean_gradient_over_all_draws_is_the_uniform_one(tmp_path, device):
    """Every outcome of a systematic draw of 3 of 6 happens once, by scores and losses of the device."""
    trainer = build(tmp_path, device, dropout=0.0)
    trainer.train()  # so that a run is there, and its loss is proven
    rows = trainer.train_dataset[:6]
    # The trainer's own way of moving a batch to where its model is.
    batch = trainer._prepare_inputs({name: rows[name] for name in ("input_ids", "attention_mask", "labels")})
    assert batch["input_ids"].device.type == device
    scores = trainer._run.pools.scorer(PooledBatches([batch], Padding()))
    assert scores.device.type == device
    pi = inclusion_probabilities(scores.cpu().double(), 3)
    losses = torch.nn.functional.cross_entropy(
        trainer.model(**batch).logits.float(), batch["labels"], reduction="none"
    )
    uniform = gradient(trainer.model, losses.mean())
    mean, total = [torch.zeros_like(g) for g in uniform], 0.0
    # One order is enough: each is unbiased by itself.
    for p, index in reference.systematic_outcomes(pi.tolist(), list(range(6))):
        kept = torch.as_tensor(index)
        drawn = {name: value[kept.to(device)] for name, value in batch.items()}
        losses = trainer._objective.head.losses(trainer.model(**drawn), drawn)
        weights = (3 / (6 * pi[kept])).float().to(device)
        for g, part in zip(mean, gradient(trainer.model, (weights * losses).mean()), strict=True):
            g += p * part
        total += p
    assert total == pytest.approx(1)
    for g, expected in zip(mean, uniform, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-5)


def gradient(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@on_both
def test_scores_in_bf16_are_those_in_fp32_to_its_precision_and_training_stays_in_fp32(tmp_path, device):
    found = {}
    for dtype in ("fp32", "bf16"):
        seen = []

        class Seen(Presample):
            def keep(self, pool, seen=seen):
                seen.append(pool.scores)
                return super().keep(pool)

        args = toys.arguments(tmp_path, use_cpu=device == "cpu", presample_ratio="auto", tau_threshold=None,
                              scoring_dtype=dtype, max_steps=2)  # fmt: skip
        sampler = Seen(ratio=3.0, threshold=1.0 + 1e-9, momentum=0.0)
        trainer = ImportanceTrainer(model(), args, train_dataset=toys.sentences(128), sampler=sampler)
        trainer.train()
        found[dtype] = seen[0]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(scores.device.type == "cpu" for scores in found.values())
    assert not torch.equal(*found.values())
    torch.testing.assert_close(*found.values(), rtol=0.03, atol=1e-3)


@on_both
@pytest.mark.parametrize("step", [4, 5])
def test_a_resumed_run_is_the_run_that_was_never_ended(tmp_path, device, step):
    options = {"save_strategy": "steps", "save_steps": step, "logging_steps": 1, "max_steps": 8}
    whole = build(tmp_path / "whole", device, **options)
    whole.train()
    resumed = build(tmp_path / "resumed", device, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole.state.log_history[-1]["importance/steps_on"] == 7


@on_both
def test_what_scoring_costs_is_measured_where_the_model_is(tmp_path, device):
    trainer = build(tmp_path, device, always=False, presample_ratio="auto", tau_threshold=None, max_steps=30)
    trainer.train()
    clock = trainer.sampler.run.clock
    assert clock.measured and 0.001 <= clock.kappa <= 0.99
