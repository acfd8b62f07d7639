"""The rivals of examples/paper against slow twins: plain Python, one example at a time."""

import importlib
from collections import deque
from pathlib import Path

import pytest
import torch
import toys
from transformers import default_data_collator

PAPER = Path(__file__).parents[1] / "examples" / "paper"


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module("rivals")


def arguments(tmp_path, **overrides):
    # Nothing is learned, so that every loss can be looked up behind training.
    return toys.arguments(tmp_path, **{"learning_rate": 0.0, "optim": "sgd", **overrides})


def losses_of(model, dataset):
    """Loss of each example, one at a time."""
    model.eval()
    found = []
    for i in range(len(dataset)):
        row = dataset[i]
        with torch.no_grad():
            logits = model(pixel_values=row["pixel_values"][None]).logits[0]
        found.append(float(logits.logsumexp(0) - logits[row["labels"]]))
    return found


def recording(kind):
    """Give the class with a list of what every step was trained on."""

    class Recording(kind):
        def __init__(self, *args, **kwargs):
            self.batches = []
            super().__init__(*args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.batches.append({name: value.clone() for name, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Recording


def flat(lists):
    return [entry for some in lists for entry in some]


def which(batch, dataset):
    """Find the examples of a batch in a dataset by their pixels."""
    rows = [dataset[i]["pixel_values"] for i in range(len(dataset))]
    return [next(i for i, row in enumerate(rows) if torch.equal(row, picture)) for picture in batch["pixel_values"]]


def test_percentiles_are_shares_of_the_window(rivals, generator):
    window = torch.randint(0, 6, (40,), generator=generator).float()  # with ties
    losses = torch.tensor([-1.0, 0.0, 2.0, 2.5, 5.0, 9.0])
    twin = [sum(float(w) <= float(x) for w in window) / 40 for x in losses]
    assert rivals.percentiles(losses, window).tolist() == pytest.approx(twin)


def test_selective_backprop_selects_as_its_twin(rivals, tmp_path, digits):
    trainer = rivals.SelectiveBackpropTrainer(
        toys.vit(), arguments(tmp_path, seed=5), train_dataset=digits, beta=2.0, window=20
    )
    history, draws = deque(maxlen=20), torch.Generator().manual_seed(5)
    losses = torch.rand(5, 12, generator=torch.Generator().manual_seed(1))
    kept = 0
    for batch in losses:
        history.extend(batch.tolist())
        chances = [(sum(h <= x for h in history) / len(history)) ** 2 for x in batch.tolist()]
        twin = [i for i, u in enumerate(torch.rand(12, generator=draws).tolist()) if u < chances[i]]
        assert trainer.select(batch).tolist() == twin
        kept += len(twin)
    assert 0 < kept < 60


def test_selective_backprop_trains_on_what_was_queued_in_order(rivals, tmp_path, digits):
    data, chosen = digits.select(range(160)), []

    class Spy(recording(rivals.SelectiveBackpropTrainer)):
        def select(self, losses):
            found = super().select(losses)
            chosen.append((losses.clone(), found))
            return found

    trainer = toys.run(Spy, toys.vit(), arguments(tmp_path, max_steps=30), data)
    sizes = [len(batch["labels"]) for batch in trainer.batches]
    assert set(sizes) == {16} and len(sizes) == trainer.state.global_step >= 4
    looked_up = losses_of(trainer.model, data)
    queued = [float(losses[i]) for losses, found in chosen for i in found]
    trained = [looked_up[i] for batch in trainer.batches for i in which(batch, data)]
    assert trained == pytest.approx(queued[: len(trained)], abs=1e-5)
    # Candidates are seen once a pass, and only a part of them is trained on.
    assert sum(len(losses) for losses, _ in chosen) > 1.5 * len(trained)


def test_top_loss_trains_on_the_largest_of_the_pool(rivals, tmp_path, digits):
    data, pools = digits.select(range(144)), []

    class Spy(recording(rivals.TopLossTrainer)):
        def training_step(self, model, inputs, *args, **kwargs):
            pools.append(which(inputs, data))
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = toys.run(Spy, toys.vit(), arguments(tmp_path, max_steps=5), data, ratio=3)
    assert trainer.state.global_step == len(pools) == 5
    losses = losses_of(trainer.model, data)
    for pool, batch in zip(pools, trainer.batches, strict=True):
        assert len(set(pool)) == 48
        twin = sorted(pool, key=lambda i: losses[i])[-16:]
        assert set(which(batch, data)) == set(twin)
    # One epoch is three pools, without a repeat.
    assert sorted(pools[0] + pools[1] + pools[2]) == list(range(144))


@pytest.mark.parametrize("prune", [0.25, 0.5])
def test_infobatch_prunes_as_its_twin(rivals, prune, generator):
    done = 0.0
    order = rivals.PrunedOrder(200, prune, 0.8, lambda: done, seed=3)
    assert sorted(order) == list(range(200)) and order.weights.tolist() == [1.0] * 200
    order.losses = torch.rand(200, generator=generator) ** 3
    mean = sum(order.losses.tolist()) / 200
    learned = {i for i, loss in enumerate(order.losses.tolist()) if loss < mean}
    seen = torch.zeros(200)
    for epoch in range(1, 401):
        order.set_epoch(epoch)
        visited = list(order)
        assert len(set(visited)) == len(visited) == len(order)
        assert set(range(200)) - learned <= set(visited)
        assert len(learned & set(visited)) == int((1 - prune) * len(learned))
        for i in visited:
            assert float(order.weights[i]) == pytest.approx(1 / (1 - prune) if i in learned else 1.0)
            seen[i] += order.weights[i]
    # Unbiased over epochs: 400 visits expected; each has a standard deviation of 20 sqrt(r / (1 - r)) at most.
    assert (seen / 400 - 1).abs().max() < 5 * (prune / (1 - prune)) ** 0.5 / 20 + 0.02
    repeated = list(order)
    order.set_epoch(400)
    assert list(order) == repeated
    done = 0.8
    order.set_epoch(401)
    assert sorted(order) == list(range(200)) and order.weights.tolist() == [1.0] * 200


def test_infobatch_in_training_remembers_losses_weighs_and_anneals(rivals, tmp_path, digits):
    data = digits.select(range(96))
    trainer = toys.run(
        recording(rivals.InfoBatchTrainer),
        toys.vit(),
        arguments(tmp_path, max_steps=-1, num_train_epochs=4),
        data,
        data_collator=default_data_collator,
        annealing=0.6,
    )
    losses = losses_of(trainer.model, data)
    assert trainer.sampler.losses.tolist() == pytest.approx(losses, abs=1e-5)
    learned = {i for i, loss in enumerate(losses) if loss < sum(losses) / 96}
    visits = [batch["index"].tolist() for batch in trainer.batches]
    first, visits = visits[:6], visits[6:]
    assert sorted(flat(first)) == list(range(96))
    kept = 96 - len(learned) + len(learned) // 2
    count = -(-kept // 16)
    second = flat(visits[:count])
    assert len(second) == len(set(second)) == kept and len(learned & set(second)) == len(learned) // 2
    # The last pass is whole again.
    assert sorted(flat(visits[-6:])) == list(range(96))


def test_infobatchs_loss_is_the_weighted_mean(rivals, tmp_path, digits):
    model = toys.vit()
    trainer = rivals.InfoBatchTrainer(model, arguments(tmp_path), train_dataset=digits.select(range(64)))
    trainer.sampler.weights = torch.linspace(0.5, 3.0, 64)
    rows = digits.select([3, 17, 40])
    batch = {"pixel_values": rows["pixel_values"][:], "labels": rows["labels"][:], "index": torch.tensor([3, 17, 40])}
    given = trainer.compute_loss(model, batch).item()
    weights = trainer.sampler.weights[[3, 17, 40]].tolist()
    twin = sum(w * loss for w, loss in zip(weights, losses_of(model, rows), strict=True)) / 3
    assert given == pytest.approx(twin, rel=1e-5)
    plain = {name: value for name, value in batch.items() if name != "index"}
    unweighted = sum(losses_of(model, rows)) / 3
    assert trainer.compute_loss(model, plain).item() == pytest.approx(unweighted, rel=1e-5)
