"""The experiments of examples/paper: each script in a small setting, what they share, the paper's settings built."""

import importlib
import itertools
import math
import re
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import toys
from PIL import Image
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments, Sampler

PAPER = Path(__file__).parents[1] / "examples" / "paper"


@pytest.fixture
def paper(monkeypatch):
    """Give what imports a module of examples/paper."""
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module


@pytest.fixture
def script(monkeypatch, tmp_path, paper):
    """Give what runs a script as ``python script arguments`` does, in this process, and gives its rows."""

    def run(name, *arguments):
        monkeypatch.setattr(paper("equal_time"), "LOOKS", 2)
        monkeypatch.setattr(paper("equal_time"), "REPORTED", 100)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--output", str(tmp_path)])
        threads = torch.get_num_threads()
        runpy.run_path(str(PAPER / f"{name}.py"), run_name="__main__")
        torch.set_num_threads(threads)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows, made = paper("figures").read(tmp_path / f"{name}.csv")
        assert made.startswith(f"python examples/paper/{name}.py ") and str(tmp_path) not in made
        return rows

    return run


def folder_of_pictures(folder, side, colour, count=8):
    """Make a data set of random pictures, four classes, as parquet files."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(4)})
    for split in ("train", "test"):
        shape = (count, side, side, 3) if colour else (count, side, side)
        images = [Image.fromarray(pixels) for pixels in generator.integers(0, 256, shape).astype("uint8")]
        rows = {"image": images, "label": [i % 4 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


# ---- The scripts ----


def test_variance_reduction_keeps_its_laws(script):
    rows = script(*("variance_reduction", "--steps", 6, "--every", 3, "--pool", 48, "--kept", 8, "--seeds", 0, 4))
    scores, ways = ("uniform", "loss", "upper_bound", "gradient_norm"), ("multinomial", "systematic")
    keys = [(r["seed"], r["step"], r["score"], r["resampling"]) for r in rows]
    assert sorted(keys) == sorted((s, t, n, w) for s in (0, 4) for t in (3, 6) for n in scores for w in ways)
    found = dict(zip(keys, rows, strict=True))
    for seed, step, name, way in keys:
        row, best = found[seed, step, name, way], found[seed, step, "gradient_norm", way]
        uniform = found[seed, step, "uniform", "multinomial"]
        assert row["relative"] == pytest.approx(row["distance"] / uniform["distance"], rel=1e-4)
        # The true norm is optimal, in theory.
        assert 0 < best["expected"] <= row["expected"] + 1e-6 and uniform["expected"] == 1
        assert best["correlation"] == pytest.approx(1) and best["squared_error"] == 0
        assert row["tau"] >= 1 and -1 <= row["correlation"] <= 1 + 1e-6
    assert found[0, 3, "upper_bound", "multinomial"]["expected"] < 1
    assert found[0, 6, "loss", "multinomial"]["squared_error"] > 0


@pytest.mark.parametrize(
    "name, systems",
    [
        ("image_classification", ("uniform", "upper_bound", "infobatch", "top_loss")),
        ("permuted_pixels", ("uniform", "upper_bound")),
        ("fine_tuning", ("uniform", "upper_bound")),
        ("pool_size", ("uniform", "ratio_2", "ratio_8")),
        ("batch_gain", ("uniform", "learning_rate_sqrt", "constant_variance_systematic")),
    ],
)
def test_a_script_gives_every_system_the_same_time(script, name, systems):
    budget = 0.2
    rows = script(name, "--seconds", budget, "--seeds", 3, "--tau_threshold", 1.0001, "--systems", *systems)
    assert list(dict.fromkeys(row["system"] for row in rows)) == list(systems)
    for system in systems:
        run = [row for row in rows if row["system"] == system]
        seconds, steps = [row["seconds"] for row in run], [row["step"] for row in run]
        # Up to one step more: the first ones, on a busy machine, take some tenths.
        assert budget <= seconds[-1] < budget + 1 and seconds == sorted(seconds)
        assert steps == sorted(steps) and steps[-1] >= 1
        for row in run:
            assert row["train_loss"] > 0 and 0 <= row["test_error"] <= 1
    if name == "pool_size":
        assert next(row["ratio"] for row in rows if row["system"] == "ratio_8") == 8
        assert all(row["predicted"] == 1 for row in rows if row["system"] == "uniform")


def test_every_system_trains_and_draws_by_importance_where_it_has_to(paper, monkeypatch):
    equal_time, systems, images = paper("equal_time"), paper("systems").SYSTEMS, paper("image_classification")
    monkeypatch.setattr(equal_time, "LOOKS", 1)
    # As many steps on a busy machine: time passes by being looked at.
    ticks = itertools.count()
    monkeypatch.setattr(equal_time, "now", lambda: next(ticks) / 300)
    given = Namespace(dataset=None, full=False)
    experiment = images.experiment(given)
    experiment.train, experiment.test = experiment.train.first(256), experiment.test.first(64)
    experiment.batch_size, experiment.ratio, experiment.tau_threshold = 16, 3.0, 1.0001
    experiment.seconds, experiment.arguments["logging_steps"] = 0.25, 1
    never = {"uniform"}
    undecided = {"auto", "cost_rule", "history"}  # they wait for more than the threshold
    assert len(systems) >= 12 and never | undecided < set(systems)
    for name, system in systems.items():
        last = equal_time.run(name, system, experiment, seed=0)[-1]
        assert last["step"] >= 3 and math.isfinite(last["train_loss"])
        assert name in undecided or (last["active_share"] > 0) == (name not in never), name


# ---- What they share ----


def test_nothing_private_is_used():
    for file in PAPER.glob("*.py"):
        assert not re.findall(r"(?:trainer|self)\._[a-z]\w*", file.read_text()), file


@pytest.mark.parametrize(("name", "power"), [("LINEAR", 1.0), ("ROOT", 0.5)])
def test_the_learning_rate_follows_the_gain_for_the_optimizers_step_alone(paper, name, power):
    trainer = Namespace(sampler=Namespace(active=True, gain=2.25))
    callback = getattr(paper("batch_gain"), name)(trainer)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    def rates():
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        raised = optimizer.param_groups[0]["lr"]
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.1
        return raised

    assert rates() == pytest.approx(0.1 * 2.25**power)
    trainer.sampler.gain = 1e6
    assert rates() == pytest.approx(0.4)
    trainer.sampler.gain = 0.5
    assert rates() == 0.1
    trainer.sampler = Namespace(active=False, gain=9.0)  # what it would be, in a uniform step
    assert rates() == 0.1


def test_infobatch_leaves_nothing_out_in_the_last_part_of_the_time(paper, tmp_path, digits):
    time, visited = [0.0], []
    sampler = paper("rivals").InfoBatchByTime(annealing=0.6, gone=lambda: time[0])

    class Passes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time[0] = state.global_step / 24
            if state.global_step % 6 == 0:
                visited.append(sum(trainer.importance_table()["visits"][:]))

    args = toys.arguments(tmp_path, presample_ratio="auto", tau_threshold=None, max_steps=24)
    trainer = ImportanceTrainer(
        toys.vit(), args, train_dataset=digits.select(range(96)), sampler=sampler, callbacks=[Passes()]
    )
    trainer.train()
    first, second, third, last = np.diff([0, *visited]).tolist()
    assert first == last == 96 and second < 90 and third < 90


def test_the_clock_counts_no_looks_and_lets_the_rate_follow_the_time(paper, monkeypatch):
    equal_time, time, looked, rates = paper("equal_time"), [100.0], [], []
    monkeypatch.setattr(equal_time, "now", lambda: time[0])

    def look(model, state, seconds):
        looked.append(seconds)
        time[0] += 50

    clock = equal_time.Clock(8.0, equal_time.divided_by_five, look, 8)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    clock.on_train_begin(None, None, None, optimizer=optimizer)
    control, steps = Namespace(should_training_stop=False), 0
    while not control.should_training_stop:
        clock.on_step_begin(None, None, control, optimizer=optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        time[0] += 3.0 if steps == 4 else 0.5
        clock.on_step_end(None, None, control)
        steps += 1
    assert looked == [1.0, 2.0, 5.0, 6.0, 7.0, 8.0]  # the long step swallows two looks
    assert steps == 11 and rates == pytest.approx([1] * 5 + [0.2] * 3 + [0.04] * 3)


def test_divided_by_five(paper):
    factor = paper("equal_time").divided_by_five
    assert [factor(x) for x in (0, 0.39, 0.4, 0.79, 0.8, 1)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


def test_seeds_are_interleaved_and_start_with_another_system_each(paper, monkeypatch):
    equal_time, order = paper("equal_time"), []

    def run(name, system, experiment, seed):
        order.append((seed, name))
        return [{"system": name, "seed": seed}]

    monkeypatch.setattr(equal_time, "run", run)
    rows = equal_time.run_all(None, {"a": None, "b": None, "c": None}, [7, 8])
    assert order == [(7, "a"), (7, "b"), (7, "c"), (8, "b"), (8, "c"), (8, "a")] and len(rows) == 6


def test_the_mean_gradient_is_that_of_the_examples_one_by_one(paper):
    module, networks = paper("variance_reduction"), paper("networks")
    torch.manual_seed(0)
    model = networks.WideResNetForImageClassification(
        networks.WideResNetConfig(depth=10, widen=1, base_width=4, num_channels=1, num_labels=3)
    )
    pixels, labels, weights = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1.0, 2, 0, 0.5, 3])
    twin = 0
    for i in range(5):
        model.zero_grad()
        model(pixels[i : i + 1], labels[i : i + 1]).loss.backward()
        twin = twin + weights[i] * torch.cat([p.grad.flatten() for p in model.parameters()]) / 5
    assert torch.allclose(module.gradient(model, pixels, labels, weights), twin, atol=1e-5)


class Linear(nn.Module):
    """A linear classifier that answers as a model of transformers does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, pixels):
        return Namespace(logits=self.layer(pixels))


def variance_of_one_draw(model, pixels, labels, shares):
    """Mean squared distance of one drawn and weighted gradient from the mean of all, outcome by outcome."""
    gradients = []
    for picture, label in zip(pixels, labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(picture[None]).logits, label[None]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    mean = sum(gradients) / len(gradients)
    outcomes = zip(shares, gradients, strict=True)
    return sum(p * float((g / (len(gradients) * p) - mean).square().sum()) for p, g in outcomes)


def test_drawn_distances_come_to_what_theory_expects(paper, monkeypatch):
    module = paper("variance_reduction")
    monkeypatch.setattr(module, "DRAWS", 400)
    torch.manual_seed(0)
    # A linear layer's gradient is as long as its inputs, which the upper bound does not know.
    pixels = (torch.randn(24, 4) + 0.5) * torch.linspace(0.2, 3, 24)[:, None]
    labels = torch.arange(24) % 2  # not the third class, so that the mean gradient is no small one
    model = Linear()
    rows, shares = module.measure(model, pixels, labels, 8, torch.Generator().manual_seed(1))
    assert all(float(share.sum()) == pytest.approx(1) for share in shares.values())
    variances = {name: variance_of_one_draw(model, pixels, labels, share.tolist()) for name, share in shares.items()}
    for row in rows:
        assert row["expected"] ** 2 == pytest.approx(variances[row["score"]] / variances["uniform"], rel=1e-3)
    spread = [(row["distance"] ** 2 + row["distance_sd"] ** 2) ** 0.5 for row in rows]
    for row, found in zip(rows[:4], spread, strict=False):
        assert row["resampling"] == "multinomial" and found / spread[0] == pytest.approx(row["expected"], rel=0.1)
    assert rows[3]["expected"] < 0.9 * rows[2]["expected"] < 0.9
    # Without replacement the same number of draws is closer.
    assert rows[7]["distance"] < 0.9 * rows[3]["distance"]


def test_the_rules_prediction_is_smallest_at_tau_over_the_root_of_kappa(paper):
    ratio = np.linspace(1.5, 20, 2000)
    found = paper("pool_size").predicted(ratio, kappa=0.25, tau=3.0)
    assert ratio[found.argmin()] == pytest.approx(3.0 / 0.5, abs=0.02)
    assert found.min() == pytest.approx((0.5 + 1 / 3) ** 2, rel=1e-4)


def test_digits_are_split_once_and_sequences_permuted_alike(paper):
    tasks = paper("tasks")
    train, test = tasks.digits()
    assert len(train) == 1344 and len(test) == 453
    together = {tuple(picture.flatten().tolist()) for part in (train, test) for picture in part.pixels}
    assert len(together) == 1797  # no picture stands twice
    some, _ = tasks.digits(range(5, 10))
    assert set(some.labels.tolist()) == set(range(5)) and 0 < len(some) < 1344
    pixels, sequence = train.pixels[:50].flatten(1), tasks.as_sequences(train.first(50)).pixels[..., 0]
    order = [(pixels == column[:, None]).all(0).nonzero()[:, 0].tolist() for column in sequence.T]
    assert all(places for places in order) and [places[0] for places in order] != list(range(64))
    assert torch.equal(sequence.sort(1).values, pixels.sort(1).values)


def test_a_missing_folder_is_named(paper, tmp_path):
    tasks = paper("tasks")
    with pytest.raises(SystemExit, match=r"no folder .*clothing10_128px.*--data"):
        tasks.pictures("clothing10", str(tmp_path), 8, False, None)
    with pytest.raises(SystemExit, match="not on the Hub"):
        tasks.pictures("clothing10", None, 8, False, None)


def test_shifted_and_mirrored_pictures_keep_size_and_label(paper):
    tasks = paper("tasks")
    torch.manual_seed(0)
    part = tasks.Pictures(torch.rand(1, 3, 8, 8), torch.tensor([2]), flip=True, shift=2)
    seen = [part[0] for _ in range(20)]
    assert all(row["pixel_values"].shape == (3, 8, 8) and row["labels"] == 2 for row in seen)
    assert len({tuple(row["pixel_values"].flatten().tolist()) for row in seen}) > 5
    assert torch.equal(part.first(1)[0]["pixel_values"], part.pixels[0])


# ---- The paper's settings, built and not run ----


def test_the_papers_wide_resnet(paper, tmp_path):
    folder = folder_of_pictures(tmp_path / "cifar", 32, colour=True)
    given = Namespace(full=True, dataset=str(folder), data=None, side=None, limit=None)
    found = paper("image_classification").experiment(given)
    assert (found.batch_size, found.batch_size * found.ratio, found.tau_threshold) == (128, 640, 1.5)
    assert found.learning_rate == 0.1 and found.arguments["weight_decay"] == 5e-4
    model = found.new_model()
    # Zagoruyko and Komodakis give 1.5 million; the shortcut of the first group and layer normalisation are in it.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.47e6, rel=0.01)
    assert sum(isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in model.modules()) == 25
    outputs = model.eval()(found.train.pixels[:2], found.train.labels[:2])
    assert outputs.logits.shape == (2, 4) and outputs.loss.isfinite()


def test_the_papers_lstm(paper, tmp_path):
    folder = folder_of_pictures(tmp_path / "mnist", 28, colour=False)
    found = paper("permuted_pixels").experiment(
        Namespace(full=True, dataset=str(folder), data=None, side=None, limit=None)
    )
    assert (found.batch_size, found.batch_size * found.ratio, found.tau_threshold) == (32, 128, 1.8)
    model = found.new_model()
    assert found.train.pixels.shape[1:] == (784, 1) and model.lstm.hidden_size == 128
    assert model(found.train.pixels[:2]).logits.shape == (2, 4)


def test_the_papers_fine_tuning(paper, tmp_path):
    # The default config of transformers' ResNet is ResNet-50; loading needs the Hub, so a small one stands in.
    assert list(ResNetConfig().depths) == [3, 4, 6, 3] and ResNetConfig().layer_type == "bottleneck"
    small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=9)
    ResNetForImageClassification(small).save_pretrained(tmp_path / "model")
    folder = folder_of_pictures(tmp_path / "mit67", 40, colour=True)
    given = Namespace(full=True, dataset=str(folder), data=None, side=None, limit=None, model=str(tmp_path / "model"))
    found = paper("fine_tuning").experiment(given)
    assert (found.batch_size, found.batch_size * found.ratio, found.tau_threshold) == (16, 48, 2.0)
    assert found.train.pixels.shape[1:] == (3, 224, 224)
    assert found.new_model().eval()(found.train.pixels[:1]).logits.shape == (1, 4)
    with pytest.raises(SystemExit, match="--full needs --dataset"):
        paper("fine_tuning").experiment(Namespace(full=True, dataset=None, model=None, data=None))


def test_the_papers_variance_reduction(paper):
    module = paper("variance_reduction")
    assert (module.FULL.pool, module.FULL.kept, module.FULL.dataset) == (1024, 128, "cifar100")
    model = module.new_model(module.FULL, 3, 100)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 100)
    assert 3000 in module.measured_steps(module.FULL) and max(module.measured_steps(module.FULL)) == 48_000


def test_every_system_says_where_it_is_from_and_its_arguments_are_accepted(paper, tmp_path, caplog):
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    experiment = Namespace(train=range(8), ratio=3.0, recompute_every=5)
    for module, name in (("systems", "SYSTEMS"), ("batch_gain", "FUTURE"), ("pool_size", "SYSTEMS_BY_POOL")):
        for system in getattr(paper(module), name).values():
            assert system.paper
            sampler = None if system.sampler is None else system.sampler(experiment, float)
            args = ImportanceTrainingArguments(str(tmp_path), use_cpu=True, **system.arguments)
            trainer = ImportanceTrainer(model=model, args=args, sampler=sampler)
            assert isinstance(trainer.sampler, Sampler) and "no effect" not in caplog.text
