"""The reserve is a pure function of (seed, rank, position), and rows of many batches become one."""

import random
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from torch.utils.data import DataLoader, default_collate

from hf_importance import ImportanceTrainer, Visits
from hf_importance.batches.entries import batch_size_of
from hf_importance.batches.indexed import IndexedCollator, IndexedDataset
from hf_importance.batches.pool import Padding, PooledBatches, merge_rows
from hf_importance.batches.random import isolated_rng
from hf_importance.batches.reserve import Population, Reserve, ReserveDataset, split_evenly
from hf_importance.batches.visits import Order
from hf_importance.ranks import Ranks
from hf_importance.run.feed import Feed


class Noisy(torch.utils.data.Dataset):
    """Each example draws from all three global generators."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"index": index, "noise": torch.rand(()) + random.random() + np.random.rand()}


def reserve(position=0, workers=0, seed=7, rank=0, together=1):
    loader = DataLoader(Noisy(), batch_size=8, num_workers=workers)
    return Reserve(ReserveDataset(Noisy(), default_collate, [5, 4], seed, rank), loader, position, together)


def take(batches, count, at_once=1):
    taken = [batch for _ in range(count) for batch in batches.take(at_once)]
    return [(batch["index"].tolist(), batch["noise"].tolist()) for batch in taken]


def test_a_batch_depends_on_its_position_alone():
    first = take(reserve(), 6)
    assert [len(indices) for indices, _ in first] == [5, 4, 5, 4, 5, 4]
    torch.rand(3), random.random(), np.random.rand()
    assert take(reserve(), 6) == first
    assert take(reserve(position=3), 3) == first[3:]
    assert take(reserve(workers=2), 6) == first
    assert take(reserve(workers=2, position=3), 3) == first[3:]


def test_what_is_taken_at_once_is_collated_as_one():
    one_by_one = [index for indices, _ in take(reserve(), 6) for index in indices]
    (found,) = reserve().take(6)
    assert found["index"].tolist() == one_by_one
    assert [len(part["index"]) for part in reserve(position=1).take(3)] == [4 + 5 + 4]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_workers_collate_several_as_one_and_what_is_taken_are_views_of_it(position):
    batches, alone = reserve(position, workers=2, together=2), reserve(position)
    taken = []
    for count in (1, 2, 2, 3):
        parts, (expected,) = batches.take(count), alone.take(count)
        assert torch.cat([part["index"] for part in parts]).equal(expected["index"])
        assert len(parts) <= 1 + -(-count // 2)
        taken += [part["index"] for part in parts]
    storages = [part.untyped_storage().data_ptr() for part in taken]
    assert len(set(storages)) == 4 + position % 2  # 8 batches, two of them at a time


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_in_the_middle_is_exact(workers):
    whole = reserve(workers=workers, together=2)
    counts = [1, 2, 3, 2]
    found = [take(whole, 1, count) for count in counts]
    assert take(reserve(position=3, workers=workers, together=2), 1, 3) == found[2]
    again = reserve(position=1, workers=workers, together=2)
    assert [take(again, 1, count) for count in counts[1:]] == found[1:]


def test_seeds_and_ranks_draw_differently():
    first = take(reserve(), 4)
    for other in (take(reserve(seed=8), 4), take(reserve(rank=1), 4)):
        for one, two in zip(first, other, strict=True):
            assert one[0] != two[0]  # which examples
            assert one[1] != two[1]  # and what the dataset draws for them


def test_the_examples_of_one_pool_are_distinct_and_all_are_reached():
    dataset = ReserveDataset(Noisy(), default_collate, [5, 4], 0, 0)
    seen = set()
    for position in range(0, 100, 2):
        pool = dataset.indices(position) + dataset.indices(position + 1)
        assert len(set(pool)) == 9
        seen |= set(pool)
    assert seen == set(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_streams_do_not_notice(workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    take(reserve(workers=workers), 4)
    assert states() == before


def test_the_position_counts_what_was_handed_out():
    batches = reserve(position=4, workers=2)
    take(batches, 3)  # workers prefetch more than that
    assert batches.position == 7


def test_isolated_rng_restores_after_an_error():
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyError), isolated_rng(3):
        torch.rand(5)
        raise KeyError
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(("total", "largest"), [(48, 32), (64, 32), (7, 3), (1, 5), (100, 33)])
def test_split_evenly_uses_the_fewest_parts(total, largest):
    parts = split_evenly(total, largest)
    assert sum(parts) == total
    assert len(parts) == -(-total // largest)
    assert max(parts) - min(parts) <= 1


def tokens(rows, side):
    """Rows of different lengths as a padded batch with labels per token, pad id 9."""
    length = max(map(len, rows))

    def pad(row, value):
        filling = [value] * (length - len(row))
        return filling + row if side == "left" else row + filling

    return {
        "input_ids": torch.tensor([pad(row, 9) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad(row, -100) for row in rows]),
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_are_padded_as_if_collated_together(side):
    padding = Padding(side=side, values={"labels": -100, "input_ids": 9})
    first, second = [[1, 2], [3]], [[4, 5, 6, 7], [8]]
    found = merge_rows([tokens(first, side), tokens(second, side)], [torch.tensor([1, 0]), torch.tensor([0])], padding)
    expected = tokens([[3], [1, 2], [4, 5, 6, 7]], side)
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in expected.items()}


def test_nested_entries_lists_and_shared_values_are_merged():
    def batch(start):
        return {
            "labels": torch.arange(start, start + 2),
            "nested": {"x": torch.arange(start, start + 2) * 10},
            "names": [f"n{start}", f"n{start + 1}"],
            "pair": (torch.arange(start, start + 2), torch.arange(start, start + 2)),
            "scale": torch.tensor(3.0),
            "flag": True,
            "nothing": None,
        }

    found = merge_rows([batch(0), batch(2)], [torch.tensor([1]), torch.tensor([1, 0])], Padding())
    assert found["labels"].tolist() == [1, 3, 2]
    assert found["nested"]["x"].tolist() == [10, 30, 20]
    assert found["names"] == ["n1", "n3", "n2"]
    assert [entry.tolist() for entry in found["pair"]] == [[1, 3, 2], [1, 3, 2]]
    assert (found["scale"].item(), found["flag"], found["nothing"]) == (3.0, True, None)


def test_a_pool_gives_its_rows_back_by_index():
    pool = PooledBatches([{"x": torch.arange(3)}, {"x": torch.arange(3, 5)}, {"x": torch.arange(5, 9)}], Padding())
    index = torch.tensor([8, 0, 4, 0, 5])
    batch, order = pool.take(index)
    assert torch.equal(batch["x"], index[order])
    assert len(pool) == 9
    assert torch.cat([chunk["x"] for chunk in pool.chunks(4)]).tolist() == list(range(9))
    assert [len(chunk["x"]) for chunk in pool.chunks(4)] == [4, 4, 1]
    assert [len(chunk["x"]) for chunk in pool.chunks(None)] == [3, 2, 4]


def test_the_batch_size_is_that_of_the_first_tensor():
    assert batch_size_of({"flag": True, "x": torch.zeros(3, 2)}) == 3
    assert batch_size_of({"nested": {"x": torch.zeros(4)}}) == 4
    with pytest.raises(ValueError, match="holds no tensor"):
        batch_size_of({"flag": True})


def test_the_reserve_reads_a_dataset_in_one_call():
    class Batched(Noisy):
        calls = 0

        def __getitems__(self, indices):
            Batched.calls += 1
            return [self[i] for i in indices]

    dataset = ReserveDataset(Batched(), default_collate, [6], 0, 0)
    dataset[0, 1]
    assert Batched.calls == 1


def test_digits_come_collated_as_the_trainer_collates(digits):
    dataset = ReserveDataset(digits, default_collate, [4], 0, 0)
    batch = dataset[2, 1]
    indices = dataset.indices(2)
    assert torch.equal(batch["labels"], torch.stack([digits[i]["labels"] for i in indices]))
    assert toys.vit()(batch["pixel_values"]).logits.shape == (4, 10)


@pytest.mark.parametrize("ranks", [1, 2])
def test_visits_hand_out_all_examples_however_they_split(ranks):
    data = IndexedDataset([{"x": torch.tensor(i)} for i in range(64)])
    loader = DataLoader(data, 8, collate_fn=IndexedCollator(default_collate))
    for micro_batches in (1, 7, 11, 13, 19, 22):
        for examples in range(micro_batches, 65 // ranks):
            index = torch.randperm(64)[: ranks * examples]
            rows, sizes = [], set()
            for rank in range(ranks):
                place = Ranks(SimpleNamespace(num_processes=ranks, process_index=rank))
                place.gather_number = lambda value: [value] * ranks
                feed = Feed(loader, place, Padding(), 0, 8, 1, 8, None, lambda: 0, Population(64))
                feed.visit(Visits(index, torch.ones(len(index)), micro_batches))
                order = Order(*feed.tensors().values(), feed.state.visits.batch_size, micro_batches, 0)
                parts = [order.index[order.rows(micro, rank, ranks)] for micro in range(micro_batches)]
                rows += torch.cat(parts).tolist()
                sizes |= {len(part) for part in parts}
            assert sorted(rows) == sorted(index.tolist())
            assert max(sizes) - min(sizes) <= 1


def test_an_example_of_a_pool_is_waited_for_no_longer_than_one_of_a_plain_step(tmp_path, digits):
    # Loading an example takes 6 ms, a training step 90 ms: without loading ahead, 16 of a pool of 24 would be waited
    # for, 4 ms an example of it.
    class Loading(torch.utils.data.Dataset):
        def __init__(self):
            self.rows = [digits[i] for i in range(128)]

        def __len__(self):
            return 128

        def __getitem__(self, index):
            time.sleep(0.006)
            return self.rows[index]

    class Waits(ImportanceTrainer):
        def get_batch_samples(self, *args):
            self.started, self.waited = time.perf_counter(), getattr(self, "waited", [])
            return super().get_batch_samples(*args)

        def training_step(self, *args, **kwargs):
            if not self.sampler.active:
                self.waited.append((time.perf_counter() - self.started) / 8)
            time.sleep(0.09)
            return super().training_step(*args, **kwargs)

    def waits(**overrides):
        args = toys.arguments(
            tmp_path, per_device_train_batch_size=8, dataloader_num_workers=2, max_steps=12, **overrides
        )
        trainer = Waits(toys.vit(), args, train_dataset=Loading())

        def score(outputs, labels):
            if not trainer.model.training:  # all of the pool has come
                trainer.waited.append((time.perf_counter() - trainer.started) / 24)
            return 1.0 + labels % 3

        trainer.compute_score_func = score
        trainer.train()
        return statistics.median(trainer.waited[3:]), trainer.sampler.active

    plain, off = waits(tau_threshold=2.8)
    importance, on = waits(tau_threshold=1 + 1e-9, momentum=0.0)
    assert on and not off
    assert importance < plain + 0.002
