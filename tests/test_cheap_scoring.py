"""Scoring is cheaper than a forward pass of what came, and says the same: sorted by length, in bf16, compiled."""

from dataclasses import dataclass

import pytest
import torch
import toys
from datasets import Dataset
from test_history import ALONE
from transformers import DataCollatorWithPadding

from hf_importance import ImportanceTrainer, Pool, Presample
from hf_importance.batches.entries import without_index
from hf_importance.batches.indexed import IndexedCollator, Visit
from hf_importance.batches.lengths import passes_by_length, sort_by_length
from hf_importance.batches.pool import Padding, PooledBatches, cut
from hf_importance.heads.choose import head_of
from hf_importance.heads.tasks import ClassificationHead
from hf_importance.objective import precision
from hf_importance.objective.scorer import Scorer, autocast_to

HEAD = ClassificationHead("single_label_classification", 4, 0.0)


class Tokenizer:
    """Pads token ids with 0, as a tokenizer does."""

    padding_side = "right"
    pad_token_id = 0

    def pad(self, features, **kwargs):
        length = max(len(feature["input_ids"]) for feature in features)
        padded = {
            name: torch.tensor([list(f[name]) + [0] * (length - len(f[name])) for f in features])
            for name in ("input_ids", "attention_mask")
        }
        return {**padded, "labels": torch.tensor([feature["labels"] for feature in features])}


def texts(examples=96):
    """Token sequences of 3 to 40 tokens, most of them short."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3 + 37 * torch.rand(examples, generator=generator) ** 4).int().tolist()
    rows = [torch.randint(10, 50, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": r, "attention_mask": [1] * len(r), "labels": r[0] % 4} for r in rows]


def batches_of(size, rows):
    return [Tokenizer().pad(rows[start : start + size]) for start in range(0, len(rows), size)]


def test_rows_come_sorted_and_without_the_padding_that_saves():
    rows = texts(40)
    batches = batches_of(10, rows)
    found = sort_by_length(batches, 16, Padding())
    assert [len(batch["labels"]) for batch in found] == [14, 13, 13]
    kept = [tuple(ids[mask.bool()].tolist()) for b in found for ids, mask in zip(*list(b.values())[:2], strict=True)]
    assert sorted(kept) == sorted(tuple(row["input_ids"]) for row in rows)
    assert [len(row) for row in kept] == sorted(len(row["input_ids"]) for row in rows)
    for batch in found:
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] == batch["attention_mask"].shape[1]
    assert sum(b["input_ids"].numel() for b in found) < 0.6 * sum(b["input_ids"].numel() for b in batches)
    label_of = {tuple(row["input_ids"]): row["labels"] for row in rows}
    assert [label_of[row] for row in kept] == torch.cat([batch["labels"] for batch in found]).tolist()


def test_labels_of_tokens_are_cut_and_several_labels_an_example_are_not():
    batch = {
        "input_ids": torch.tensor([[5, 0, 0], [6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    }
    tokens = sort_by_length([{**batch, "labels": torch.tensor([[1, -100, -100], [2, 3, -100]])}], 2, Padding())
    assert tokens[0]["labels"].tolist() == [[1, -100], [2, 3]]
    decoders = sort_by_length([{**batch, "labels": torch.tensor([[1, 9, 9], [2, 3, -100]])}], 2, Padding())
    assert decoders[0]["labels"].tolist() == [[2, 3, -100], [1, 9, 9]]  # longest last, whatever is long
    several = sort_by_length([{**batch, "labels": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])}], 2, Padding())
    assert several[0]["labels"].shape == (2, 3)
    assert several[0]["input_ids"].shape == (2, 2)


def test_nothing_is_cut_where_columns_may_mean_something_else():
    batch = batches_of(4, texts(4))[0]
    assert sort_by_length([batch], 4, Padding(side="left")) is None
    assert sort_by_length([{"pixel_values": torch.zeros(4, 1, 8, 8)}], 4, Padding()) is None
    assert sort_by_length([{**batch, "pixel_values": torch.zeros(4, 1, 8, 8)}], 4, Padding()) is None
    assert sort_by_length([{**batch, "attention_mask": torch.ones(4, 1, 8, 8)}], 4, Padding()) is None


def test_scores_are_those_of_the_unsorted_texts():
    model, batches = toys.bert(dropout=0.3), batches_of(8, texts(32))
    plain = toys.score_pool(model, PooledBatches(batches, Padding()), HEAD)
    ordered = toys.score_pool(model, PooledBatches(sort_by_length(batches, 8, Padding()), Padding()), HEAD)
    torch.testing.assert_close(plain.sort().values, ordered.sort().values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [None, 5, 16])
def test_scores_of_texts_sorted_by_length_stand_where_the_pool_has_them(size):
    model, batches = toys.bert(dropout=0.3), batches_of(8, texts(32))
    plain = toys.score_pool(model, PooledBatches(batches, Padding()), HEAD, size=size)
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    pool = PooledBatches(batches, Padding(), lengths)
    assert passes_by_length(pool, size) is not None
    torch.testing.assert_close(toys.score_pool(model, pool, HEAD, size=size), plain, rtol=1e-5, atol=1e-6)
    # Where one batch's are not known, or all are as long, they are scored as they came.
    assert passes_by_length(PooledBatches(batches, Padding(), [*lengths[:-1], None]), size) is None
    alike = batches_of(8, texts(1) * 32)
    assert passes_by_length(PooledBatches(alike, Padding(), [b["attention_mask"].sum(1) for b in alike]), size) is None


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.tensor([[1, 1, 0], [0, 0, 0]]), [2, 0]),
        (torch.ones(2, 0), None),  # texts of no token
        (torch.ones(2, 3, device="meta"), None),  # the user's collator has moved it, so asking would wait
        (torch.ones(2, 1, 3, 3), None),
        ([[1], [1]], None),
    ],
)
def test_a_collator_tells_lengths_where_they_are_at_hand_and_never_raises(mask, told):
    collate = IndexedCollator(lambda rows: {"attention_mask": mask, 0: "a name that is none"})
    found = collate([Visit(5, {}), Visit(6, {})])
    assert found["importance_index"].tolist() == [5, 6]
    assert told is None if "importance_lengths" not in found else found["importance_lengths"].tolist() == told
    rest, index = without_index(found)
    assert set(rest) == {"attention_mask", 0} and index.tolist() == [5, 6]


def test_a_column_is_left_of_texts_that_are_all_padding():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    assert cut(batch, 0, Padding())["input_ids"].shape == (2, 1)
    assert cut(batch, 0, Padding(multiple=2))["attention_mask"].shape == (2, 2)


@pytest.mark.parametrize("method", ["presample", "auto"])
def test_a_run_scores_few_tokens_that_are_padding_its_own_batch_among_them(tmp_path, method):
    seen, model = [], toys.bert()

    def count(module, args, kwargs):
        if not module.training:
            seen.append((kwargs["input_ids"].numel(), int(kwargs["attention_mask"].sum()), len(kwargs["input_ids"])))

    model.register_forward_pre_hook(count, with_kwargs=True)
    args = toys.always_on(tmp_path, scoring_batch_size=8, max_steps=6, importance_method="presample")
    if method == "auto":  # whose collator knows the indices, so the lengths come with the batch
        settings = {"importance_method": "auto", "tau_threshold": None, "kappa": 0.05}
        args = toys.arguments(tmp_path, scoring_batch_size=8, max_steps=12, momentum=0.0, calibrate=False, **settings)
    score = {"compute_score_func": lambda outputs, labels: torch.where(labels == 0, 1.0, 1e-3)}
    data = Dataset.from_list(texts(96))
    toys.run(ImportanceTrainer, model, args, data, data_collator=DataCollatorWithPadding(Tokenizer()), **score)
    scored, needed, rows = map(sum, zip(*seen, strict=True))
    # As they were loaded, padded to the longest of 16, they would be more than 3 times as many; with only what
    # completes a pool sorted by length 2.2 and 3.1 times.
    assert rows > 200 and needed < scored < 1.6 * needed
    assert max(count for _, _, count in seen) <= 8


class Lazy(torch.nn.Module):
    """Makes a table once, in its first forward pass, and multiplies by it."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = toys.bert(), None

    def forward(self, **inputs):
        found = self.inner(**inputs)
        self.table = torch.ones(4) if self.table is None else self.table
        found.logits = found.logits * self.table
        return found


def test_what_a_model_keeps_of_scoring_may_be_trained_with():
    model, batch = Lazy(), batches_of(8, texts(8))[0]
    toys.score_pool(model, PooledBatches([batch], Padding()), HEAD)
    model(**batch).logits.sum().backward()
    assert model.inner.classifier.weight.grad is not None


@dataclass
class OfSize(Presample):
    """Scores a pool of one size in every step, and keeps what it saw."""

    size: int = 16
    remembers = True

    def pool(self):
        return Pool(self.size, self.run.batch_size, varies=True)

    def keep(self, pool):
        self.seen = pool
        return super().keep(pool)


@pytest.mark.parametrize(
    ("texts", "size", "given", "expected"),
    [
        (False, 24, None, [24]),
        (False, 32, None, [32]),
        (False, 40, None, [20, 20]),
        (False, 24, 16, [12, 12]),
        (True, 24, None, [16, 8]),
    ],
)
def test_a_pool_takes_as_few_passes_as_may_be(tmp_path, digits, texts, size, given, expected):
    data, model = (toys.sentences(64), toys.bert()) if texts else (digits.select(range(64)), toys.vit())
    settings = {"presample_ratio": "auto", "tau_threshold": None, "learning_rate": 0.0}
    args = toys.arguments(tmp_path, max_steps=2, scoring_batch_size=given, **settings)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, _, inputs: (
            None if module.training else sizes.append(len(inputs["input_ids" if texts else "pixel_values"]))
        ),
        with_kwargs=True,
    )
    trainer = toys.run(ImportanceTrainer, model, args, data, sampler=OfSize(size=size))
    assert sizes == [16, *expected]  # in the first step, a uniform one, its own batch was scored for the time it takes
    pool, head = trainer.sampler.seen, head_of(model, 0.0, None)
    rows = [PooledBatches([trainer.data_collator([data[i]])], Padding()) for i in pool.index.tolist()]
    one_by_one = torch.cat([toys.score_pool(model, row, head) for row in rows])
    assert len(rows) == size
    torch.testing.assert_close(pool.scores.float(), one_by_one)


def dtypes_seen(model, batch, scoring_dtype):
    seen = []
    hook = model.classifier.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    found = toys.score_pool(model, PooledBatches([batch], Padding()), HEAD, dtype=scoring_dtype)
    hook.remove()
    return seen[0], found


@pytest.mark.parametrize("training", ["no", "bf16"])
@pytest.mark.parametrize(
    ("scoring", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32), (None, None)]
)
def test_scoring_has_its_own_precision_whatever_training_uses(tmp_path, training, scoring, expected):
    data = toys.sentences(64)
    args = toys.always_on(tmp_path, bf16=training == "bf16", scoring_dtype=scoring, max_steps=2)
    trainer = toys.run(ImportanceTrainer, toys.bert(), args, data)
    forward = vars(trainer.model).get("forward")
    found, scores = dtypes_seen(trainer.model, data[:16], scoring)
    assert found == (expected or (torch.bfloat16 if training == "bf16" else torch.float32))
    assert scores.dtype == torch.float32
    # And training has what it had.
    assert vars(trainer.model).get("forward") is forward
    assert trainer.model(**data[:4]).logits.dtype == torch.float32
    with autocast_to(trainer.model, None):
        assert vars(trainer.model).get("forward") is forward


class Clocked:
    """Says how much time has passed: a pass in training's precision takes 3, one in bf16 so much."""

    def __init__(self, bf16):
        self.now, self.bf16, self.scorer = 0.0, bf16, None

    def process_time(self):
        return self.now

    def score(self):
        self.now += self.bf16 if self.scorer.dtype == "bf16" else 3.0


@pytest.mark.parametrize(("bf16", "chosen"), [(2.0, "bf16"), (2.9, "training"), (9.0, "training")])
def test_the_cheaper_precision_is_taken_where_it_is_cheaper(monkeypatch, bf16, chosen):
    clock = Clocked(bf16)
    monkeypatch.setattr("hf_importance.transfer.time", clock)
    scorer = clock.scorer = Scorer(lambda: None, HEAD)
    tries = precision.Precision(scorer, ALONE, torch.device("cpu"), "bf16")
    for step in range(precision.TRIES + 1):
        assert not tries.known, step
        assert scorer.dtype is None
        tries.try_out(clock.score)
    assert tries.known
    assert tries.chosen == chosen
    assert scorer.dtype == (None if chosen == "training" else "bf16")
    before = clock.now
    tries.try_out(clock.score)
    assert clock.now == before
    again = precision.Precision(Scorer(lambda: None, HEAD), ALONE, torch.device("cpu"), "bf16")
    again.choose(chosen)
    assert again.known


def test_a_run_measures_its_precision_and_a_resumed_one_knows_it(tmp_path, caplog):
    data, settings = toys.sentences(64), {"scoring_dtype": "auto", "max_steps": 10}
    with caplog.at_level("INFO", "hf_importance"):
        trainer = toys.run(
            ImportanceTrainer,
            toys.bert(),
            toys.always_on(tmp_path, save_steps=8, save_strategy="steps", **settings),
            data,
        )
        chosen = trainer._run.state.scoring_dtype
        assert chosen in ("bf16", "training")
        assert trainer._run.pools.scorer.dtype == (None if chosen == "training" else "bf16")
        again = ImportanceTrainer(model=toys.bert(), args=toys.always_on(tmp_path, **settings), train_dataset=data)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again._run.state.scoring_dtype == chosen
    assert sum("Scoring in bf16 takes" in record.getMessage() for record in caplog.records) == 1


def test_nothing_is_tried_where_training_has_the_cheaper_precision():
    assert precision.cheaper_than(toys.bert(), True, torch.device("cpu")) is None
    assert precision.cheaper_than(toys.bert().bfloat16(), False, torch.device("cpu")) is None
    assert precision.cheaper_than(toys.bert(), False, torch.device("cpu")) == "bf16"


class Widths(ImportanceTrainer):
    """Keeps what it trains on."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._run is not None and self._run.step.kind == "pool":
            self.__dict__.setdefault("drawn", []).extend(batches)
        return batches, items


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("ratio", [3.0, "auto"])
def test_a_drawn_batch_is_no_wider_than_its_longest_row(tmp_path, ratio, multiple):
    data = Dataset.from_list(texts(96))
    args = toys.always_on(
        tmp_path, max_steps=12, presample_ratio=ratio, importance_budget="constant_variance", kappa=0.1
    )
    collator = DataCollatorWithPadding(Tokenizer(), pad_to_multiple_of=multiple)
    trainer = toys.run(Widths, toys.bert(), args, data, data_collator=collator)
    assert len(trainer.drawn) > 5
    narrower = 0
    for batch in trainer.drawn:
        longest = int(batch["attention_mask"].sum(1).max())
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        limit = longest if multiple is None else -(-longest // multiple) * multiple
        assert longest <= batch["input_ids"].shape[1] <= limit
        narrower += longest < 30
    assert narrower  # there are some that are not as wide as the widest of a pool


def test_low_precision_hardly_moves_the_distribution():
    model = toys.bert(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    batch = toys.sentences(256)[:256]
    full = dtypes_seen(model, batch, None)[1]
    for dtype in ("bf16", "fp16"):
        low = dtypes_seen(model, batch, dtype)[1]
        assert not torch.equal(low, full)
        moved = (low / low.sum() - full / full.sum()).abs().sum() / 2
        assert moved < 0.005


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # torch's own
def test_scoring_is_compiled_where_training_is(tmp_path, monkeypatch):
    # 60 s: two compilations, one for training and one for scoring.
    compilations, make = [], torch.compile

    def compiled(*args, **kwargs):
        compilations.append(make(*args, **kwargs))
        return compilations[-1]

    monkeypatch.setattr(torch, "compile", compiled)
    data = toys.sentences(128)
    args = toys.always_on(tmp_path, torch_compile=True, max_steps=4, logging_steps=4)
    trainer = toys.run(ImportanceTrainer, toys.bert(dropout=0.1), args, data)
    assert trainer.state.log_history[-2]["importance/active_share"] == 0.75
    assert len(compilations) == 2
    pool = PooledBatches([data[:16], data[16:32]], Padding())
    found = toys.score_pool(trainer.model, pool, HEAD, compile=lambda model: compilations[1])
    expected = toys.score_pool(trainer.model, pool, HEAD)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert trainer.model.training
