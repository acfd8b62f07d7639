"""The laws of ``hf_importance.testing`` see it when a sampler breaks one."""

from dataclasses import dataclass, field

import pytest
import torch

from hf_importance import Pool, Sampler
from hf_importance.ranks import Ranks
from hf_importance.run.run import Run
from hf_importance.samplers.published import InfoBatch, SelectiveBackprop
from hf_importance.testing import SamplerLaws


class TopK(Sampler):
    """Keeps all laws."""

    def pool(self):
        return Pool(3 * self.run.batch_size, self.run.batch_size)

    def keep(self, pool):
        return pool.scores.topk(pool.kept).indices, torch.ones(pool.kept)


class KeepsAWindow(SelectiveBackprop):
    """Learns in ``keep``, where a step is not done yet."""

    def keep(self, pool):
        found = super().keep(pool)
        self.learn(1.0, self.measure(pool))
        return found


class HasAGenerator(TopK):
    """Draws by a generator that no checkpoint has."""

    def begin(self, run):
        super().begin(run)
        self.generator = torch.Generator().manual_seed(0)

    def keep(self, pool):
        return torch.randperm(len(pool.scores), generator=self.generator)[: pool.kept], torch.ones(pool.kept)


class Counts(TopK):
    """Decides by what it does not save."""

    def begin(self, run):
        super().begin(run)
        self.steps = 0

    def pool(self):
        return super().pool() if self.steps % 3 else None

    def learn(self, tau, sums):
        self.steps += 1


class DrawsGlobally(TopK):
    """Takes random numbers that the Trainer's dropout would have taken."""

    def learn(self, tau, sums):
        torch.rand(())


class MeasuresWhatItLikes(TopK):
    def measure(self, seen):
        return [1.0] * (1 + self.run.step() % 2)


class Remembers(TopK):
    """Begins a run with the state of the last one."""

    @dataclass
    class State:
        steps: int = 0

    kept = State()

    def begin(self, run):
        super().begin(run)
        self.state = self.kept

    def learn(self, tau, sums):
        self.state.steps += 1


class HoldsATensor(TopK):
    @dataclass
    class State:
        average: float = field(default_factory=lambda: float("nan"))


class Unweighted(InfoBatch):
    """Leaves examples out and weighs none up."""

    def visits(self):
        found = super().visits()
        if found is not None:
            object.__setattr__(found, "weights", torch.ones(len(found.index)))
        return found


class Heavy(TopK):
    """Draws uniformly, with weights of mean 2."""

    def keep(self, pool):
        rows = torch.randint(len(pool.scores), (pool.kept,), generator=pool.generator)
        return rows, torch.full((pool.kept,), 2.0)


class Waits(TopK):
    """Never draws."""

    def pool(self):
        return None


class KnowsItsRank(TopK):
    @dataclass
    class State:
        rank: int = 0

    def learn(self, tau, sums):
        self.state.rank = self.run.rank


def laws_of(kind, **attributes):
    return type("Laws", (SamplerLaws,), {"sampler": lambda self: kind(), **attributes})()


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (KeepsAWindow, "asked_twice_it_says_the_same_and_changes_nothing"),
        (HasAGenerator, "asked_twice_it_says_the_same_and_changes_nothing"),
        (MeasuresWhatItLikes, "asked_twice_it_says_the_same_and_changes_nothing"),
        (Counts, "resumed_after_a_step_it_goes_on_as_if_never_interrupted"),
        (Remembers, "its_state_is_json_and_all_that_it_knows"),
        (Waits, "it_draws"),
    ],
)
def test_a_broken_law_is_seen(kind, law, tmp_path_factory):
    with pytest.raises(AssertionError):
        getattr(laws_of(kind), f"test_{law}")(tmp_path_factory)


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (KeepsAWindow, "resumed_within_a_step_it_goes_on_as_if_never_interrupted"),
        (DrawsGlobally, "never_on_it_is_the_plain_trainer"),
    ],
)
def test_a_broken_law_of_runs_of_its_own_is_seen(kind, law, tmp_path):
    with pytest.raises(AssertionError):
        getattr(laws_of(kind), f"test_{law}")(tmp_path)


def test_a_state_that_is_not_json_is_seen(tmp_path_factory):
    with pytest.raises(ValueError, match=r"JSON compliant|average must be a number"):
        laws_of(HoldsATensor).test_its_state_is_json_and_all_that_it_knows(tmp_path_factory)


@pytest.mark.parametrize("kind", [TopK, Heavy, Unweighted])
def test_a_bias_that_is_denied_is_seen(kind, tmp_path_factory):
    with pytest.raises(AssertionError, match="off by"):
        laws_of(kind, unbiased=True).test_it_is_unbiased_where_it_says_so(tmp_path_factory)


def test_a_second_collective_is_seen(tmp_path_factory, monkeypatch):
    commit = Run.commit

    def twice(self, *args, **kwargs):
        Ranks.sum(self.ranks, [0.0])
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(Run, "commit", twice)
    with pytest.raises(AssertionError):
        laws_of(TopK).test_a_step_has_one_collective(tmp_path_factory)


class LawsOfKnowsItsRank(SamplerLaws):
    def sampler(self):
        return KnowsItsRank()


@pytest.mark.slow  # two processes
def test_ranks_that_differ_are_seen(tmp_path):
    with pytest.raises(AssertionError, match="rank"):
        LawsOfKnowsItsRank().test_two_ranks_decide_alike(tmp_path)
