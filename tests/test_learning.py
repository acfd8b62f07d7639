"""A run where it matters: most examples are solved, a few are not."""

import pytest
import torch
import toys
from datasets import concatenate_datasets
from transformers import Trainer

from hf_importance import ImportanceTrainer


@pytest.fixture(scope="module")
def solved_and_new(digits):
    """A ViT that knows the digits 0 to 6, and data with 800 of those and 40 of 7 to 9."""
    labels = torch.as_tensor(digits["labels"])
    known = digits.select(torch.where(labels < 7)[0][:800].tolist())
    new = digits.select(torch.where(labels >= 7)[0][:40].tolist())
    args = toys.arguments("unused", max_steps=800, learning_rate=3e-3, per_device_train_batch_size=64)
    model = toys.run(Trainer, toys.vit(hidden_size=32, intermediate_size=64, patch_size=2), args, known).model
    return {name: value.clone() for name, value in model.state_dict().items()}, concatenate_datasets([known, new])


def training_loss(model, data):
    with torch.no_grad():
        return float(model.eval()(**data[:]).loss)


def test_it_switches_on_draws_the_hard_ones_and_learns_faster_per_step(tmp_path, solved_and_new):
    weights, data = solved_and_new
    losses = {Trainer: [], ImportanceTrainer: []}
    for seed in range(4):
        for kind in losses:
            model = toys.vit(hidden_size=32, intermediate_size=64, patch_size=2)
            model.load_state_dict(weights)
            drawn = []

            class Look(kind):
                def compute_loss(self, model, inputs, *args, **kwargs):
                    drawn.append(inputs["labels"])  # noqa: B023
                    return super().compute_loss(model, inputs, *args, **kwargs)

            args = toys.arguments(
                tmp_path, seed=seed, max_steps=80, logging_steps=10, learning_rate=0.03, optim="sgd",
                lr_scheduler_type="constant", per_device_train_batch_size=16,
            )  # fmt: skip
            trainer = toys.run(Look, model, args, data)
            losses[kind].append(training_loss(trainer.model, data))
            if kind is ImportanceTrainer:
                assert any(e.get("importance/switches") for e in trainer.state.log_history)
                hard = (torch.cat(drawn[-30:]) >= 7).float().mean()
                assert hard > 2 * 40 / 840
    # Measured: 0.199 against 0.319, every seed lower by a third.
    assert sum(losses[ImportanceTrainer]) < 0.85 * sum(losses[Trainer])
