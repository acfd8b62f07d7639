"""Training by remembered scores: what the table holds, what is drawn, logged, saved and resumed."""

import json
import math
from itertools import pairwise

import pytest
import torch
import toys
from transformers import Trainer

from hf_importance import ImportanceTrainer
from hf_importance.remembering import Remembering
from hf_importance.visits import INDEX, IndexedCollator, IndexedDataset

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

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.__dict__.setdefault("seen_batches", []).append(
                (inputs[INDEX].tolist(), inputs.get("importance_weights"), inputs["input_ids"].clone())
            )
        return super().compute_loss(model, inputs, *args, **kwargs)


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
    assert float(weights.mean()) == pytest.approx(1, abs=0.1)
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
    with pytest.raises(ValueError, match=r"importance_method='history'.*it is 'presample'"):
        ImportanceTrainer(model=toys.bert(), args=toys.arguments("/tmp")).importance_table()


def test_steps_are_spread_evenly(saving):
    sizes = [len(index) for index, weights, _ in saving.seen_batches if weights is not None]
    assert max(abs(a - b) for a, b in pairwise(sizes)) <= 3
    assert min(sizes) >= 4


def test_the_saving_is_said_at_the_end(tmp_path, caplog):
    with caplog.at_level("INFO", "hf_importance"):
        trainer = train(tmp_path, max_steps=STEPS)
    assert f"Trained on {EXAMPLES} examples where uniform sampling takes {EXAMPLES} (100.0 %)" in caplog.text
    assert trainer.state.global_step == STEPS


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


def test_the_state_is_json_and_safetensors(tmp_path):
    train(tmp_path, max_steps=10, save_strategy="steps", save_steps=10)
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]["history"]
    assert saved["averages"]["examples"] == 160
    assert not list(tmp_path.rglob("*.unfinished"))


# ---- What is refused ----


def test_a_stream_is_refused_with_the_alternative(tmp_path):
    data = toys.sentences(EXAMPLES).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"must be map-style.*importance_method='presample'"):
        train(tmp_path, data)


def test_an_order_by_lengths_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_sampling_strategy='group_by_length'"):
        train(tmp_path, train_sampling_strategy="group_by_length")


def test_a_batch_that_is_no_dict_is_refused():
    collate = IndexedCollator(lambda examples: torch.stack(examples))
    with pytest.raises(ValueError, match="must give a dict, but it gives Tensor"):
        collate(IndexedDataset(torch.rand(4, 2)).__getitems__([0, 1]))


def test_one_epoch_is_warned_of(tmp_path, caplog):
    train(tmp_path, max_steps=2)
    assert sum("nothing to remember in a run of one epoch" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("uniform_share", 0.0, r"must lie in \(0, 1\], but it is 0.0"),
        ("variance_margin", 0.9, "at least 1, but it is 0.9"),
        ("importance_method", "memory", "must be one of 'presample', 'history'"),
        ("importance_budget", "time", "must be one of 'variance', 'constant_variance', 'constant_time'"),
    ],
)
def test_bad_values_are_refused(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=f"{name} must.*|{message}") as error:
        arguments(tmp_path, **{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_norm", "batch"), ("batch_norm", "running"), ("importance_score", "gradient_norm")]
)
def test_what_needs_a_pool_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name}='{value}' .*importance_method='presample'"):
        arguments(tmp_path, **{name: value})


# ---- How long passes are ----


@pytest.mark.parametrize(
    ("examples", "batch", "accumulation"), [(1000, 8, 4), (1000, 8, 1), (100, 32, 4), (100, 32, 3), (70, 32, 2)]
)
def test_passes_fill_the_epoch_whatever_its_length(examples, batch, accumulation):
    class Loader:
        dataset, batch_size, total_batch_size = range(examples), batch, batch

        def __len__(self):
            return math.ceil(examples / batch)

    settings = arguments("/tmp", uniform_share=0.1)
    remembering = Remembering(settings, Loader(), accumulation, 0, 1, 0, lambda rows: rows)
    random = torch.Generator().manual_seed(0)
    for step in range(4):
        remembering.history.record(
            torch.arange(examples),
            torch.rand(examples, generator=random).exp() ** 4,
            torch.full((examples,), step).int(),
            torch.ones(examples),
        )
    remembering.history.refit()
    remembering.history.averages.add(1000, 3.0, 1.0, 0.9)
    epoch, micro_batches = object(), len(Loader())
    for update in range(remembering.updates):
        remembering.begin_step(epoch, 0)
        if remembering.at_decision:
            assert remembering.decide()
        current = remembering.history.current
        # As many as Trainer asks for: with fewer it would not make the optimizer step.
        wanted = min(accumulation, micro_batches - update * accumulation)
        assert current.length - current.position >= wanted
        current.position += wanted
    assert current.position == current.length
    assert len(current.index.unique()) == len(current.index)


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
        current = None if self._remembering is None else self._remembering.history.current
        self.passes.append(None if current is None else (current.uniform, current.number))
        return super().training_step(model, inputs, *args, **kwargs)


def test_where_memory_stops_paying_the_rest_of_the_epoch_is_uniform(tmp_path):
    ours = train(tmp_path, kind=Fading, score=None, max_steps=6 * STEPS)
    kinds = ["trainer" if found is None else "uniform" if found[0] else "drawn" for found in ours.passes]
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
    assert whole.passes[78][0] and whole.passes[79][0]
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
