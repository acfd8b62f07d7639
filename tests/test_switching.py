"""When importance sampling is on: below a price of 0.9, off above 1, and a twentieth of an epoch between switches."""

import itertools
from types import SimpleNamespace

import pytest
import toys
from test_auto import forgetful, persistent, spans, trained

from hf_importance import Auto, History, ImportanceTrainer, Presample
from hf_importance.reporting.best import past_its_best
from hf_importance.samplers.sampler import Facts
from hf_importance.theory.costs import OFF_ABOVE, ON_BELOW, STREAM_STAY


class Known:
    """What a sampler knows of a run of 1,000 steps, at a step that can be set."""

    def __init__(self, updates=200, step=0):
        self.now, self.visits = step, False
        known = {
            "updates": updates,
            "batch_size": 16,
            "accumulation": 1,
            "ranks": 1,
            "table": None,
            "clock": SimpleNamespace(measured=True, kappa=0.1, overhead=None, give=lambda kappa: None),
            "step": lambda: self.now,
            "steps": lambda: 1000,
            "place": lambda: self.now % updates if updates else 0,
            "visiting": lambda: self.visits,
            "tau": lambda: 1.0,
        }
        self.facts = Facts(**{**dict.fromkeys(Facts.__dataclass_fields__), **known})


def follow(sampler, known, prices):
    """Give whether presampling is on behind each step, one a price."""
    found = []
    for price in prices:
        known.now += 1
        sampler.price = lambda price=price: price
        sampler.learn(2.0, [])
        found.append(sampler.state.on)
    return found


def begun(known, **settings):
    sampler = Presample(**settings)
    sampler.begin(known.facts)
    return sampler


def test_the_price_decides_with_a_gap():
    known = Known(updates=20)  # a twentieth is a step
    prices = [0.98, 0.91, 0.89, 0.95, 0.99, 1.01, 0.95, 0.89]
    assert follow(begun(known), known, prices) == [False, False, True, True, True, False, False, True]
    assert (ON_BELOW, OFF_ABOVE) == (0.9, 1.0)
    known = Known(updates=20)
    own = begun(known, on_below=0.5, off_above=2.0)
    assert follow(own, known, [0.6, 0.4, 1.9, 2.1]) == [False, True, True, False]
    with pytest.raises(ValueError, match="off_above"):
        Presample(on_below=0.8, off_above=0.7)


@pytest.mark.parametrize(("updates", "stay"), [(200, 10), (201, 11), (0, STREAM_STAY)])
def test_between_switches_it_stays_a_twentieth_of_an_epoch(updates, stay):
    known = Known(updates)
    found = follow(begun(known), known, itertools.chain([0.5], itertools.repeat(2.0, stay), [2.0]))
    assert found == [True] * stay + [False] * 2
    # Saved: whoever goes on from within does the same.
    for cut in range(1, stay + 1):
        known = Known(updates)
        one = begun(known)
        before = follow(one, known, itertools.chain([0.5], itertools.repeat(2.0, cut - 1)))
        other = begun(known)
        other.load_state_dict(one.state_dict())
        assert before + follow(other, known, itertools.repeat(2.0, stay + 2 - cut)) == found


def test_it_does_not_go_on_at_the_end_and_may_go_off():
    for left, goes in ((11, True), (10, True), (9, False)):
        known = Known(step=1000 - left - 1)
        assert follow(begun(known), known, [0.5]) == [goes]
    known = Known(step=980)
    assert follow(begun(known), known, [0.5] + [2.0] * 15) == [True] * 10 + [False] * 6


def test_a_threshold_of_tau_is_the_papers_rule():
    known = Known(step=998)
    sampler = begun(known, ratio=3.0, threshold=1.5)
    found, taus = [], [2.0, 1.0, 2.0]
    for tau in taus:
        object.__setattr__(known.facts, "tau", lambda tau=tau: tau)
        sampler.learn(tau, [])
        found.append(sampler.state.on)
    assert found == [True, False, True] and sampler.state.switched is None


class Remembers(History):
    """A memory of a given price, that draws nothing."""

    worth = 1.0

    @property
    def price(self):
        return self.worth

    def calibrate(self):
        pass

    def _by_scores(self):
        return "by scores"

    def _uniformly(self):
        return "uniformly"


def both(known, fresh=0.95):
    sampler = Auto(remembered=Remembers())
    sampler.begin(known.facts)
    sampler.fresh.price = lambda: fresh
    return sampler


@pytest.mark.parametrize(
    ("worth", "on", "expected"),
    [(0.95, False, None), (0.89, False, "by scores"), (0.95, True, "by scores"), (1.01, True, None)],
)
def test_memory_goes_by_the_same_gap(worth, on, expected):
    known = Known()
    alone, sampler = Remembers(), both(known)
    alone.begin(known.facts)
    for one in (alone, sampler.remembered):
        one.worth, one.state.drawn = worth, on
    assert alone.visits() == sampler.visits() == expected


def test_memory_does_not_begin_at_the_end():
    for left, expected in ((10, "by scores"), (9, None)):
        known = Known(step=1000 - left)
        sampler = both(known)
        sampler.remembered.worth = 0.5
        assert sampler.visits() == expected


def test_one_takes_over_from_the_other_where_it_is_a_tenth_cheaper_and_not_at_once():
    known = Known(step=100)
    sampler = both(known, fresh=0.5)
    follow(sampler.fresh, known, [0.5])
    assert sampler.fresh.state.on
    sampler.remembered.worth = 0.4
    assert sampler.visits() is None  # it has just gone on
    known.now += 10
    sampler.remembered.worth = 0.46
    assert sampler.visits() is None and sampler.fresh.state.on
    sampler.remembered.worth = 0.44
    assert sampler.visits() == "by scores" and not sampler.fresh.state.on
    # And back, as soon as visits end.
    sampler.remembered.worth = 0.55
    assert sampler.visits() == "by scores"
    sampler.remembered.worth = 0.56
    assert sampler.visits() is None
    assert sampler.fresh.state.on and sampler.source == "presample"


@pytest.mark.parametrize(("score", "method"), [(forgetful, "presample"), (persistent, "auto")])
def test_in_a_run_no_two_switches_are_closer(tmp_path, score, method):
    # An epoch has 64 steps, of which 4 are a twentieth.
    settings = {"importance_method": method, "kappa": 0.1, "importance_budget": "constant_variance", "momentum": 0.0}
    settings |= {"presample_ratio": None, "tau_threshold": None, "max_steps": 200}
    lengths = [n for _, n in spans(trained(tmp_path, score, data=toys.sentences(1024), **settings).sources)]
    assert len(lengths) > 1 and min(lengths[1:-1], default=4) >= 4


# ---- Past its best ----


@pytest.mark.parametrize(
    ("losses", "said_at"),
    [
        ([0.5, 0.4, 0.39, 0.42, 0.63, 0.7], 4),  # once
        ([0.4, 0.41, 0.415, 0.42], None),  # rises, but not by 5 %
        ([0.4, 0.41, 0.415, 0.43], 3),
        ([0.4, 0.5, 0.45, 0.46, 0.44], None),  # goes up and down
        ([0.4, 0.9], None),
        ([0.4, float("nan"), 0.5, 0.6], 3),
        ([], None),
    ],
)
def test_it_is_said_once_where_it_is_clear(losses, said_at):
    log = [{"step": 100 * at, "eval_loss": loss} for at, loss in enumerate(losses)]
    said = [past_its_best(log[: end + 1]) for end in range(len(log))]
    assert [at for at, sentence in enumerate(said) if sentence] == ([] if said_at is None else [said_at])
    if said_at == 4:
        expected = (
            "Your run has passed its best evaluation loss at step 200 (0.39; now 0.63): fewer epochs are cheaper"
        )
        assert said[4].startswith(expected)


@pytest.mark.parametrize("on", [False, True])
def test_a_run_that_overfits_says_so_and_trains_the_same(tmp_path, caplog, on):
    # 32 examples with random labels are learnt by heart, whether or not importance sampling is on.
    make = toys.always_on if on else toys.arguments
    settings = {"max_steps": 80, "learning_rate": 3e-2, "logging_steps": 20, "lr_scheduler_type": "constant"}
    noise = toys.sentences(32, seed=1).map(lambda row, at: {"labels": at % 4}, with_indices=True)
    other = toys.sentences(64, seed=2).map(lambda row, at: {"labels": at % 4}, with_indices=True)
    finals = []
    for evaluated in (True, False):
        args = make(tmp_path, **settings, eval_strategy="steps" if evaluated else "no", eval_steps=10)
        trainer = ImportanceTrainer(model=toys.bert(), args=args, train_dataset=noise, eval_dataset=other)
        trainer.train()
        finals.append([parameter.sum().item() for parameter in trainer.model.parameters()])
        if evaluated:
            trainer.evaluate()
    assert finals[0] == finals[1]
    said = [record.getMessage() for record in caplog.records if "best evaluation loss" in record.getMessage()]
    assert len(said) == 1
