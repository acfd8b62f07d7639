"""Training by remembered scores: what the table holds, what is drawn, logged, saved and resumed."""

import json
import math
from itertools import pairwise

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from test_history import ALONE, facts
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer

from hf_importance import History, ImportanceTrainer
from hf_importance.batches.entries import INDEX, WEIGHTS, index_of
from hf_importance.batches.indexed import IndexedCollator, IndexedDataset
from hf_importance.batches.pool import Padding
from hf_importance.batches.random import key_to_seed
from hf_importance.batches.reserve import Population
from hf_importance.run.feed import Feed
from hf_importance.run.table import Table

EXAMPLES, BATCH = 256, 16
STEPS = EXAMPLES // BATCH  # an epoch


def uneven(outputs, labels):
    """Score one class ten times as high as the others: what is remembered of an example stays true."""
    return 1.0 + 9.0 * (labels == 0).float()


def arguments(tmp_path, **overrides):
    settings = {"importance_method": "history", "max_steps": 6 * STEPS, "logging_steps": 4}
    return toys.arguments(tmp_path, **{**settings, **overrides})


class Look(ImportanceTrainer):
    """Keeps what is trained on."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in toys.handed(self, batches):
            row = (batch[INDEX].tolist(), batch.get(WEIGHTS), batch["input_ids"].clone())
            self.__dict__.setdefault("seen_batches", []).append(row)
        return batches, items


def train(tmp_path, data=None, kind=Look, score=uneven, model=None, **overrides):
    data = toys.sentences(EXAMPLES) if data is None else data
    trainer = kind(
        model=toys.bert(dropout=0.1) if model is None else model,
        args=arguments(tmp_path, **overrides),
        train_dataset=data,
        **({} if score is None else {"compute_score_func": score}),
    )
    trainer.train()
    return trainer


def logged(trainer, key):
    return [e["importance/" + key] for e in trainer.state.log_history if "importance/" + key in e and "loss" in e]


@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    return train(tmp_path_factory.mktemp("saving"), importance_budget="constant_variance")


def test_it_goes_on_and_trains_on_fewer_examples(saving):
    assert logged(saving, "active")[0] == 0
    assert logged(saving, "active")[-1] == 1
    gain, trained, saved = (logged(saving, key)[-1] for key in ("gain", "examples_trained", "examples_saved"))
    uniform = trained + saved
    scores = torch.cat([uneven(None, torch.as_tensor(toys.sentences(EXAMPLES)["labels"]))])
    best = float(scores.square().mean() / scores.mean() ** 2)
    assert 1.5 < gain < best
    assert uniform == 6 * EXAMPLES
    assert trained == sum(len(index) for index, _, _ in saving.seen_batches) < 0.8 * uniform
    assert saving.state.global_step == 6 * STEPS
    assert logged(saving, "examples_scored")[-1] == 0
    assert logged(saving, "skipped_share")[-1] > 0.4


def test_the_index_is_that_of_the_example(saving):
    data = toys.sentences(EXAMPLES)
    for index, _, tokens in saving.seen_batches:
        assert torch.equal(data[index]["input_ids"], tokens)


def test_weights_undo_the_preference(saving):
    # The share of the examples that score high, weighted, is their share of the dataset.
    data = toys.sentences(EXAMPLES)
    high = torch.as_tensor(data["labels"]) == 0
    drawn = [(torch.tensor(index), weights) for index, weights, _ in saving.seen_batches if weights is not None]
    index, weights = (torch.cat(part) for part in zip(*drawn, strict=True))
    assert float(high[index].float().mean()) > 1.4 * float(high.float().mean())
    weighted = float((weights * high[index]).sum() / len(weights))
    assert weighted == pytest.approx(float(high.float().mean()), rel=0.12)
    assert float(weights.mean()) == pytest.approx(1, abs=0.15)  # three standard errors of 330 visits
    assert weights.max() <= 10


def test_the_table_counts_visits_and_weights(saving):
    table = saving.importance_table()
    visits = torch.bincount(
        torch.tensor([i for index, _, _ in saving.seen_batches for i in index]), minlength=EXAMPLES
    )
    assert table["visits"][:] == visits.tolist()
    assert sum(table["weight_sum"][:]) == pytest.approx(sum(visits.tolist()), rel=0.1)
    high = torch.as_tensor(toys.sentences(EXAMPLES)["labels"]) == 0
    assert table["score"][:] == pytest.approx((1 + 9 * high.float()).tolist())
    assert visits[high].double().mean() > 1.3 * visits[~high].double().mean()
    with pytest.raises(ValueError, match=r"importance_method='history'.*it is Presample"):
        ImportanceTrainer(model=toys.bert(), args=toys.arguments("/tmp")).importance_table()


def test_steps_are_spread_evenly(saving):
    sizes = [len(index) for index, weights, _ in saving.seen_batches if weights is not None]
    assert max(abs(a - b) for a, b in pairwise(sizes)) <= 3
    assert min(sizes) >= 4


def test_how_it_went_is_said_at_the_end(tmp_path, capsys):
    train(tmp_path, max_steps=STEPS)
    assert f"Importance sampling: never on in {STEPS} steps" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run(tmp_path, saving):
    again = train(tmp_path, importance_budget="constant_variance")
    assert [index for index, _, _ in again.seen_batches] == [index for index, _, _ in saving.seen_batches]
    assert torch.equal(toys_parameters(again), toys_parameters(saving))


def toys_parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Rows(torch.utils.data.Dataset):
    """A torch dataset with a column that the model does not take."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {**self.data[index], "unused": "text"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrap", [Rows, lambda data: data.add_column("unused", ["text"] * len(data))])
def test_while_nothing_is_to_be_won_it_is_the_plain_trainer(tmp_path, wrap, workers):
    data = wrap(toys.sentences(EXAMPLES))
    flat = lambda outputs, labels: torch.ones(len(labels))  # noqa: E731
    settings = {"max_steps": 3 * STEPS, "dataloader_num_workers": workers}
    ours = train(tmp_path, data, ImportanceTrainer, flat, **settings)
    plain = train(tmp_path, data, Trainer, None, **settings)
    assert torch.equal(toys_parameters(ours), toys_parameters(plain))
    assert [toys.own(e) for e in ours.state.log_history] == [toys.own(e) for e in plain.state.log_history]
    assert set(logged(ours, "active")) == {0.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_score_is_credited_to_its_example(tmp_path, workers):
    # The label of an example is its number, and so is its score.
    data = toys.sentences(EXAMPLES).remove_columns("labels").add_column("labels", [float(i) for i in range(EXAMPLES)])
    trainer = train(
        tmp_path,
        data.with_format("torch"),
        ImportanceTrainer,
        lambda outputs, labels: labels + 1,
        toys.bert(num_labels=1),
        dataloader_num_workers=workers,
        learning_rate=1e-6,
    )
    assert logged(trainer, "active")[-1] == 1
    assert trainer.importance_table()["score"][:] == pytest.approx([i + 1 for i in range(EXAMPLES)], rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_is_the_weighted_mean_over_the_step(tmp_path, accumulation):
    # Nothing is learnt, so the loss of every step can be computed from what it was trained on.
    model, data = toys.bert(), toys.sentences(EXAMPLES)
    trainer = train(
        tmp_path,
        model=model,
        learning_rate=0.0,
        gradient_accumulation_steps=accumulation,
        max_steps=5 * STEPS // accumulation,
        logging_steps=1,
        importance_budget="constant_variance",
    )
    with torch.no_grad():
        logits = model(torch.stack(list(data["input_ids"]))).logits
    losses = torch.nn.functional.cross_entropy(logits, torch.as_tensor(data["labels"]), reduction="none")
    batches = iter(trainer.seen_batches)
    for epoch_step, entry in enumerate(e for e in trainer.state.log_history if "loss" in e):
        last = (epoch_step + 1) % math.ceil(STEPS / accumulation) == 0
        micros = [next(batches) for _ in range(1 if last and accumulation == 3 else accumulation)]
        weighted = [losses[i] * (torch.ones(len(i)) if w is None else w) for i, w, _ in micros]
        assert entry["loss"] == pytest.approx(float(torch.cat(weighted).mean()), rel=1e-4)
    assert entry["importance/active_share"] == 1


# ---- Resume ----


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (12, {}),  # the table is not full
        (40, {}),  # calibrated, off
        (60, {}),  # in a pass
        (60, {"importance_budget": "constant_variance", "dataloader_num_workers": 2}),
        (20, {"gradient_accumulation_steps": 3, "max_steps": 32}),
        (24, {"gradient_accumulation_steps": 3, "max_steps": 32}),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, at, settings):
    settings = {"save_strategy": "steps", "save_steps": at, **settings}
    whole = train(tmp_path / "whole", **settings)
    resumed = Look(
        model=toys.bert(dropout=0.1),
        args=arguments(tmp_path / "resumed", **settings),
        train_dataset=toys.sentences(EXAMPLES),
        compute_score_func=uneven,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert logged(whole, "active")[-1] == 1
    assert torch.equal(toys_parameters(whole), toys_parameters(resumed))
    tail = len(resumed.seen_batches)
    assert [i for i, _, _ in whole.seen_batches[-tail:]] == [i for i, _, _ in resumed.seen_batches]
    timeless = lambda e: {k: v for k, v in e.items() if not k.endswith(("time_share", "_runtime", "_per_second"))}  # noqa: E731
    histories = [[timeless(e) for e in t.state.log_history if "train_loss" not in e] for t in (whole, resumed)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "kappa", "drawn_by"), [("history", None, {"visits"}), ("auto", 0.2, {"visits", "pool"})]
)
def test_saving_does_not_change_the_run_that_follows(tmp_path, method, kappa, drawn_by, workers):
    class Kinds(ImportanceTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.__dict__.setdefault("seen", []).append((self._run.step.kind, inputs["input_ids"].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    pinned = {} if kappa is None else {"kappa": kappa}
    settings = {"importance_budget": "constant_variance", "dataloader_num_workers": workers, **pinned}
    never, always = (
        train(tmp_path / name, kind=Kinds, importance_method=method, logging_steps=100, **settings, **saving)
        for name, saving in {"never": {}, "always": {"save_strategy": "steps", "save_steps": 1}}.items()
    )
    assert len(list((tmp_path / "always").glob("checkpoint-*"))) == 6 * STEPS
    assert {kind for kind, _ in never.seen} == {"batch", *drawn_by}
    assert never.seen == always.seen
    assert torch.equal(toys_parameters(never), toys_parameters(always))
    assert never.sampler.state_dict() == always.sampler.state_dict()
    assert never.importance_table().to_pandas().equals(always.importance_table().to_pandas())


def test_a_lost_or_foreign_table_is_named(tmp_path):
    train(tmp_path, max_steps=10, save_strategy="steps", save_steps=5)
    file = tmp_path / "checkpoint-10" / "importance_history.safetensors"

    def resume(folder=file.parent, examples=EXAMPLES):
        data = toys.sentences(examples)
        trainer = ImportanceTrainer(model=toys.bert(), args=arguments(tmp_path, max_steps=12), train_dataset=data)
        trainer.train(resume_from_checkpoint=folder if folder is True else str(folder))

    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", None):
        file.unlink() if broken is None else file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"importance_history.safetensors(?s:.*)(cut off|half-written)"):
            resume()
    other = tmp_path / "checkpoint-5" / file.name
    file.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="was written at step 5, and the checkpoint is of step 10"):
        resume()
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="remembers scores of 256 examples, and train_dataset has 250"):
        resume(examples=250)
    resume()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores", -1.0, "scores or weights that are negative or not finite"),
        ("weight_sum", math.nan, "scores or weights that are negative or not finite"),
        ("weights", math.nan, "the visits in progress are missing, or their weights are negative or not finite"),
        ("weights", None, "the visits in progress are missing"),
        ("index", EXAMPLES, "the visits in progress are missing, .* or train_dataset has not the examples"),
        ("index", "cut", "the visits in progress are missing"),
        ("weights", "cut", "the visits in progress are missing"),
        ("rows", None, "rows, the visits of the last steps, is missing"),
        ("scores", None, "scores is missing"),
    ],
)
def test_a_damaged_table_is_refused_before_a_step(tmp_path, name, value, message):
    settings = {"importance_budget": "constant_variance", "max_steps": 62}
    train(tmp_path, save_strategy="steps", save_steps=60, **settings)
    file = tmp_path / "checkpoint-60" / "importance_history.safetensors"
    tensors = load_file(file)
    if value is None:
        del tensors[name]
    elif value == "cut":
        tensors[name] = tensors[name][:-5].contiguous()
    else:
        tensors[name][3] = value
    save_file(tensors, file, {"step": "60"})
    args = arguments(tmp_path, **settings)
    trainer = ImportanceTrainer(toys.bert(), args, train_dataset=toys.sentences(EXAMPLES), compute_score_func=uneven)
    with pytest.raises(ValueError, match=rf"checkpoint-60/importance_history\.safetensors.*{message}"):
        trainer.train(resume_from_checkpoint=str(file.parent))
    assert trainer.state.global_step == 60


def test_the_state_is_json_and_safetensors(tmp_path):
    train(tmp_path, max_steps=10, save_strategy="steps", save_steps=10)
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]
    assert saved["run"]["examples"] == 160
    assert saved["sampler"]["settings"]["name"] == "History"
    assert saved["table"] == {"paired": 0, "waiting": 1}
    tensors = load_file(tmp_path / "checkpoint-10" / "importance_history.safetensors")
    assert {name: len(tensor) for name, tensor in tensors.items()} == {
        "scores": EXAMPLES,
        "seen": EXAMPLES,
        "visits": EXAMPLES,
        "weight_sum": EXAMPLES,
        "pairs": 1024,
        "rows": 16,  # those of the last step
    }
    assert not list(tmp_path.rglob("*.unfinished"))


def test_with_another_score_the_table_begins_anew(tmp_path):
    data = toys.sentences(EXAMPLES)
    train(tmp_path, score=None, max_steps=40, save_strategy="steps", save_steps=40)
    args = arguments(tmp_path / "again", max_steps=42, importance_score="loss")
    resumed = ImportanceTrainer(toys.bert(), args, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    table = resumed.importance_table()
    assert sum(table["visits"]) == 2 * BATCH
    assert sum(not math.isnan(score) for score in table["score"]) == 2 * BATCH


# ---- What is refused ----


def test_a_stream_is_refused_with_the_alternative(tmp_path):
    data = toys.sentences(EXAMPLES).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"must be map-style.*importance_method='presample'"):
        train(tmp_path, data)


def test_an_order_by_lengths_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_sampling_strategy='group_by_length'"):
        train(tmp_path, train_sampling_strategy="group_by_length")


class Pairs:
    """A batch with a place for each entry, and names for none."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids, labels = inputs
        return model(input_ids=ids, labels=labels).loss


def test_a_batch_that_is_no_dict_has_no_place_for_the_index_and_is_off(tmp_path, caplog):
    collate = IndexedCollator(lambda examples: torch.stack(examples))
    data = torch.rand(4, 2)
    assert torch.equal(collate(IndexedDataset(data).__getitems__([2, 0])), data[[2, 0]])

    def pairs(examples):
        return tuple(torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels"))

    settings = {"data_collator": pairs, "max_steps": 2 * STEPS}
    ours, plain = (
        train_pairs(tmp_path, type("Own", (Pairs, kind), {}), **settings) for kind in (ImportanceTrainer, Trainer)
    )
    assert "a batch is a tuple and no dict" in toys.reason(caplog)
    toys.same_run(ours, plain)


def train_pairs(tmp_path, kind, data_collator, max_steps):
    args = arguments(tmp_path, max_steps=max_steps, remove_unused_columns=False)
    return toys.run(kind, toys.bert(dropout=0.1), args, toys.sentences(EXAMPLES), data_collator=data_collator)


def test_one_epoch_is_warned_of(tmp_path, caplog):
    train(tmp_path, max_steps=2)
    assert sum("nothing to remember in a run of one epoch" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("share", 0.0, r"share must be a number in \(0, 1\], but it is 0.0"),
        ("margin", 0.9, "margin must be a finite number of at least 1, but it is 0.9"),
        ("momentum", 1.0, r"momentum must be a number in \[0, 1\), but it is 1.0"),
        (
            "importance_method",
            "memory",
            "must be one of None, 'presample', 'history', 'auto', 'two_phase', 'observe', but it is 'memory'",
        ),
        ("importance_budget", "time", "'variance', 'constant_variance', 'constant_time', but it is 'time'"),
        (
            "importance_budget",
            "constant_time",
            "no meaning with importance_method='history', whose scores cost nothing",
        ),
        ("resampling", "systematic", "has 'resampling', which importance_method='history' does not know"),
    ],
)
def test_bad_values_are_refused(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        ImportanceTrainer(toys.bert(), arguments(tmp_path, **{name: value}))


@pytest.mark.parametrize("method", ["history", "auto", "observe"])
def test_what_needs_a_pool_is_refused(tmp_path, method):
    with pytest.raises(ValueError, match=r"score='gradient_norm' .*importance_method='presample'"):
        ImportanceTrainer(toys.bert(), arguments(tmp_path, importance_method=method, score="gradient_norm"))


# ---- How long passes are ----


@pytest.mark.parametrize(
    ("examples", "batch", "accumulation"), [(1000, 8, 4), (1000, 8, 1), (100, 32, 4), (100, 32, 3), (70, 32, 2)]
)
def test_passes_fill_the_epoch_whatever_its_length(examples, batch, accumulation):
    data = IndexedDataset([{"x": torch.tensor(i)} for i in range(examples)])
    loader = DataLoader(data, batch, collate_fn=IndexedCollator(default_collate))
    micro_batches, table, sampler = len(loader), Table(examples, ALONE), History()
    updates = math.ceil(micro_batches / accumulation)
    drawn_from = Population(examples)
    feed = Feed(loader, ALONE, Padding(), 0, batch, accumulation, updates, None, lambda: 0, drawn_from)
    sampler.begin(
        facts(
            table,
            examples=examples,
            batch_size=batch,
            accumulation=accumulation,
            micro_batches=micro_batches,
            updates=updates,
            ranks=1,
            place=lambda: feed.place,
            visiting=lambda: feed.visiting,
            draws=lambda: feed.state.draws,
            generator=lambda *key: torch.Generator().manual_seed(key_to_seed(0, *key)),
        )
    )
    random = torch.Generator().manual_seed(0)
    for step in range(4):
        scores = torch.rand(examples, generator=random).exp() ** 4
        table.add(torch.arange(examples), scores.double(), torch.ones(examples).double(), step)
        table.exchange()
    sampler.calibrate()
    sampler.learn(1.5, [1000, 3.0, 1.0])
    epoch, seen, begun = iter(()), [], []
    for update in range(updates):
        feed.follow(epoch, accumulation)
        if feed.decision_due:
            feed.visit(sampler.visits())
            assert sampler.active
            assert sampler.state.skipped_share == 1 - len(feed.tensors()["index"]) / examples
            begun.append(len(feed.tensors()["index"]))
            seen.append([])
        # As many as Trainer asks for: with fewer it would not make the optimizer step.
        wanted = min(accumulation, micro_batches - update * accumulation)
        handed = feed.hand_out(wanted)
        assert len(handed.batches) == wanted
        assert torch.cat([index_of(one) for one in handed.batches]).equal(handed.index)
        seen[-1] += handed.index.tolist()
    # Each pass ends where its examples do, and the last with the epoch.
    assert [len(one) for one in seen] == begun
    assert all(len(set(one)) == len(one) for one in seen)
    feed.follow(iter(()), accumulation)
    assert feed.decision_due


# ---- Memory that stops paying ----


class Fading(Look):
    """Scores that memory knows until step 66, in the middle of an epoch, and then noise of a heavy tail."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_score_func=self.fade, **kwargs)
        self.passes, self.noise = [], torch.Generator().manual_seed(0)

    def fade(self, outputs, labels):
        if self.state.global_step < 66:
            return uneven(outputs, labels)
        return 1000 * torch.rand(len(labels), generator=self.noise).pow(8)

    def training_step(self, model, inputs, *args, **kwargs):
        step = self._run.step
        kind = {"batch": "trainer", "visits": "drawn" if step.drawn else "uniform"}[step.kind]
        self.passes.append((kind, self._run.feed.state.draws))
        return super().training_step(model, inputs, *args, **kwargs)


def test_where_memory_stops_paying_the_rest_of_the_epoch_is_uniform(tmp_path):
    ours = train(tmp_path, kind=Fading, score=None, max_steps=6 * STEPS)
    kinds = [kind for kind, _ in ours.passes]
    assert kinds[69] == "drawn" and "uniform" in kinds[70:80]
    step = kinds.index("uniform")
    for batch, kind in zip(ours.seen_batches, kinds, strict=True):
        index, weights, _ = batch
        assert len(set(index)) == len(index)
        if kind == "uniform":
            assert torch.equal(weights, torch.ones(BATCH))
    # The epoch ends at step 80, and the Trainer's own loader goes on.
    assert set(kinds[step:80]) == {"uniform"} and kinds[80] == "trainer"
    assert logged(ours, "active")[19] == 0


def test_a_run_is_resumed_in_a_uniform_pass(tmp_path):
    settings = {"kind": Fading, "score": None, "max_steps": 82, "save_strategy": "steps"}
    whole = train(tmp_path, save_steps=79, **settings)
    assert whole.passes[78][0] == whole.passes[79][0] == "uniform"
    resumed = Fading(
        model=toys.bert(dropout=0.1),
        args=arguments(tmp_path / "again", max_steps=82),
        train_dataset=toys.sentences(EXAMPLES),
    )
    resumed.noise.manual_seed(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-79"))
    assert resumed.passes[0] == whole.passes[79]
    assert [i for i, _, _ in resumed.seen_batches] == [i for i, _, _ in whole.seen_batches[79:]]
    assert torch.equal(toys_parameters(resumed), toys_parameters(whole))
