"""What a run shows while it trains, and what ``train()`` gives back of it."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
import toys
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from hf_importance import ImportanceTrainer
from hf_importance.reporting.progress import StatusProgressCallback


def shown(tmp_path, digits, resume=None, **overrides):
    """Train with the bar on; give what reached the terminal as errors, where the bar is, and as output."""
    args = toys.always_on(tmp_path, **{"disable_tqdm": False, **overrides})
    trainer = ImportanceTrainer(toys.vit(), args, train_dataset=digits.select(range(128)))
    with redirect_stderr(io.StringIO()) as terminal, redirect_stdout(io.StringIO()) as output:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, terminal.getvalue(), output.getvalue()


def uneven(outputs, labels):
    """A score whose gain is known from the first step on."""
    return 1.0 + 9.0 * (labels == 0).float()


@pytest.fixture
def every_step_drawn(monkeypatch):
    own = StatusProgressCallback.on_step_end

    def draw(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.training_bar.refresh()

    monkeypatch.setattr(StatusProgressCallback, "on_step_end", draw)


def test_the_bar_shows_on_or_off_and_what_it_goes_by(tmp_path, digits, every_step_drawn):
    _, terminal, printed = shown(tmp_path, digits, tau_threshold=1.5, momentum=0.9)
    states = re.findall(r"IS (on|off) \(τ ([\d.]+) ([<>]) 1\.50\)", terminal)
    assert states and {(state, sign) for state, _, sign in states} == {("off", "<")}
    assert "Importance sampling on" not in printed
    _, terminal, printed = shown(tmp_path, digits)
    states = re.findall(r"IS (on|off) \(τ ([\d.]+) ([<>]) 1\.00\)", terminal)
    assert states[0] == ("off", "1.00", "<") and states[-1][0::2] == ("on", ">")
    (line,) = re.findall(r"^Importance sampling on .*$", printed, re.MULTILINE)  # a switch
    assert re.fullmatch(r"Importance sampling on \(τ 1\.\d\d > 1\.00\) after step 1, at τ 1\.\d\d\.", line)


def test_the_bar_says_what_it_costs_or_would_cost(tmp_path, digits, every_step_drawn):
    settings = {"presample_ratio": "auto", "tau_threshold": None}
    trainer, terminal, _ = shown(tmp_path, digits, **settings, logging_steps=1, kappa=0.9)
    costs = re.findall(r"IS off \(would cost ([\d.]+)x\)", terminal)
    logged = [f"{e['importance/relative_cost']:.2f}" for e in trainer.state.log_history if "loss" in e]
    assert costs and set(costs) <= set(logged)


def test_the_bar_says_what_it_costs_while_it_is_on(tmp_path, every_step_drawn, capsys):
    settings = {"importance_method": "presample", "kappa": 0.1, "disable_tqdm": False}
    args = toys.arguments(tmp_path, presample_ratio="auto", tau_threshold=None, **settings)
    toys.run(ImportanceTrainer, toys.bert(), args, toys.sentences(256), compute_score_func=uneven)
    output, terminal = capsys.readouterr()
    assert re.search(r"IS on \(0\.\d\dx\)", terminal)
    assert re.search(r"^Importance sampling on \(0\.\d\dx\) after step \d+, at τ", output, re.MULTILINE)


def test_a_resumed_run_that_is_on_says_no_switch(tmp_path, digits):
    overrides = {"save_strategy": "steps", "save_steps": 4}
    shown(tmp_path, digits, **overrides)
    _, terminal, printed = shown(tmp_path, digits, resume=str(tmp_path / "checkpoint-4"), **overrides)
    assert "IS on" in terminal and "after step" not in printed


def test_disable_tqdm_silences_it(tmp_path, digits):
    trainer, terminal, printed = shown(tmp_path, digits, disable_tqdm=True)
    assert terminal == "" and "after step" not in printed
    assert not any(isinstance(c, ProgressCallback) for c in trainer.callback_handler.callbacks)


def test_there_is_one_bar_and_a_users_own_stays(tmp_path, digits):
    class Mine(ProgressCallback):
        pass

    args = toys.arguments(tmp_path, disable_tqdm=False)
    trainer = ImportanceTrainer(toys.vit(), args, train_dataset=digits, callbacks=[Mine()])
    kinds = [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    assert sorted(kind.__name__ for kind in kinds) == ["Mine", "StatusProgressCallback"]


def test_switched_off_by_the_argument_the_bar_is_the_trainers(tmp_path, digits):
    args = toys.arguments(tmp_path, disable_tqdm=False, importance_sampling=False)
    trainer = ImportanceTrainer(toys.vit(), args, train_dataset=digits)
    assert not any(isinstance(c, StatusProgressCallback) for c in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_notebook_shows_it_in_bar_and_table(tmp_path, digits, monkeypatch, capsys, evaluated):
    pytest.importorskip("IPython", reason="needs IPython, as a notebook does")
    import transformers.trainer
    from transformers.utils.notebook import NotebookProgressCallback

    drawn = []
    from IPython import display

    monkeypatch.setattr(display, "display", lambda html, **kwargs: drawn.append(html.data) or Handle(drawn))
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    overrides = {"eval_strategy": "steps", "eval_steps": 2} if evaluated else {}
    args = toys.always_on(tmp_path, disable_tqdm=False, **overrides)
    small = digits.select(range(128))
    toys.run(ImportanceTrainer, toys.vit(), args, small, eval_dataset=small.select(range(16)))
    assert any(re.search(r"Epoch [\d.]+/1, IS on \(τ 1\.00 > 1\.00\)", html) for html in drawn)
    rows = re.findall(r"<tr.*?>(.*?)</tr>", drawn[-1], re.DOTALL)
    cells = [[text.strip() for text in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]
    assert cells[0][-2:] == ["τ", "Importance"]
    assert [(row[0], row[-1][:2]) for row in cells[1:]] == [("2", "on"), ("4", "on"), ("6", "on"), ("8", "on")]
    assert "Importance sampling on" in capsys.readouterr().out  # the switch, in a line of its own


class Handle:
    """What ``IPython.display.display`` gives back in a notebook: draws again."""

    def __init__(self, drawn):
        self.drawn = drawn

    def update(self, html):
        self.drawn.append(html.data)


def test_the_returned_metrics_say_what_was_done(tmp_path, digits):
    args = toys.always_on(tmp_path, kappa=0.25)
    trainer = ImportanceTrainer(toys.vit(), args, train_dataset=digits.select(range(128)))
    result = trainer.train()
    assert isinstance(result, TrainOutput)
    ours = {name.removeprefix("importance/"): v for name, v in result.metrics.items() if "importance/" in name}
    seconds, tau = ours.pop("scoring_seconds"), ours.pop("largest_tau")
    assert ours.pop("tau_threshold") == 1 + 1e-9 < tau
    # Eight steps of 16, the first of them uniform; seven pools of 48.
    counts = {"steps_on": 7, "examples_scored": 7 * 48, "examples_trained": 8 * 16, "examples_saved": 0}
    assert ours == {**counts, "kappa": 0.25}
    assert 0 < seconds < result.metrics["train_runtime"]
    last = trainer.state.log_history[-1]
    assert "train_runtime" in last
    assert {name: last["importance/" + name] for name in ours} == ours


def test_counts_of_the_returned_metrics_go_on_after_resuming(tmp_path, digits):
    small = digits.select(range(128))
    args = toys.always_on(tmp_path, save_strategy="steps", save_steps=4)
    whole = ImportanceTrainer(toys.vit(), args, train_dataset=small).train().metrics
    trainer = ImportanceTrainer(toys.vit(), args, train_dataset=small)
    resumed = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).metrics
    names = [f"importance/{name}" for name in ("steps_on", "examples_scored", "examples_trained", "examples_saved")]
    assert [resumed[name] for name in names] == [whole[name] for name in names] == [7, 7 * 48, 8 * 16, 0]


def test_switched_off_by_the_argument_the_metrics_are_the_trainers(tmp_path, digits):
    small = digits.select(range(128))
    ours = ImportanceTrainer(toys.vit(), toys.arguments(tmp_path, importance_sampling=False), train_dataset=small)
    plain = Trainer(toys.vit(), toys.arguments(tmp_path), train_dataset=small)
    assert ours.train().metrics.keys() == plain.train().metrics.keys()


def test_with_memory_the_bar_shows_its_cost(tmp_path, every_step_drawn):
    args = toys.arguments(tmp_path, importance_method="history", max_steps=64, disable_tqdm=False)
    with redirect_stderr(io.StringIO()) as terminal:
        toys.run(ImportanceTrainer, toys.bert(), args, toys.sentences(256), compute_score_func=uneven)
    assert "IS off (remembering scores)" in terminal.getvalue()
    assert float(re.findall(r"IS on \(([\d.]+)x\)", terminal.getvalue())[-1]) < 1.1 / 1.5
