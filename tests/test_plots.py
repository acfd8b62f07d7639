"""The figure of a run shows what was logged, from a trainer, a log or a folder, and leaves out what was not."""

import importlib
import sys

import pytest
import torch
import toys

from hf_importance import ImportanceTrainer
from hf_importance.reporting import plots
from hf_importance.reporting.plots import DETAILS, VERMILLION, plot_training
from hf_importance.reporting.report import WEIGHT_EDGES, Report, outcome


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, digits):
    """Eight steps, on from the second; evaluated and saved."""
    args = toys.always_on(
        tmp_path_factory.mktemp("run"), eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4
    )
    small = digits.select(range(128))
    return toys.run(ImportanceTrainer, toys.vit(), args, small, eval_dataset=small.select(range(16)))


def titles(figure):
    return [axes.get_title(loc="left").split(" (")[0] for axes in figure.axes]


def drawn(axes):
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.get_lines()}


def logged(log, key, at="loss"):
    return [(entry["step"], entry[key]) for entry in log if at in entry and key in entry]


def test_the_three_panels_hold_what_was_logged(tmp_path, digits):
    args = toys.arguments(
        tmp_path,
        presample_ratio="auto",
        tau_threshold=None,
        kappa=0.1,
        importance_log="basic",
        eval_strategy="steps",
        eval_steps=4,
    )
    small = digits.select(range(128))
    accuracy = lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}  # noqa: E731
    ours = toys.run(ImportanceTrainer, toys.vit(), args, small, eval_dataset=small, compute_metrics=accuracy)
    assert len(plot_training(ours).axes) == 3  # nothing saved, nothing drawn
    log = [{**e, "importance/examples_saved": 5 * e["step"]} for e in ours.state.log_history]
    figure = plot_training(log)
    loss, metric, cost, saved = figure.axes
    assert titles(figure)[2:] == ["cost of a step by importance at equal noise", "examples saved"]
    assert drawn(loss)["training loss"] == logged(log, "loss")
    assert drawn(loss)["evaluation loss"] == [(e["step"], e["eval_loss"]) for e in log if "eval_loss" in e]
    assert drawn(metric)["accuracy (right)"] == [(e["step"], e["eval_accuracy"]) for e in log if "eval_loss" in e]
    course, even = (line.get_data() for line in cost.get_lines())
    assert list(zip(*map(list, course), strict=True)) == logged(log, "importance/relative_cost")
    assert set(even[1]) == {1}
    assert list(drawn(saved).values()) == [logged(log, "importance/examples_saved", at="step")]
    assert figure.get_suptitle().replace("\n", " ") == outcome(log[-1], 8)


def test_with_detail_every_panel_holds_what_was_logged(trainer):
    figure = plot_training(trainer, detail=True)
    panels = ["", "τ", "effective sample size", "largest weight"]  # as large batches as ever: nothing is saved
    assert titles(figure) == [*panels, "weights of the examples drawn"]
    log = trainer.state.log_history
    loss, tau, size, weight, histogram = figure.axes
    assert drawn(loss)["training loss"] == logged(log, "loss")
    # A threshold was given, so τ is what it goes by.
    assert drawn(tau)["τ"] == logged(log, "importance/tau")
    assert drawn(tau)["threshold"] == logged(log, "importance/tau_threshold")
    assert [step for step, _ in drawn(tau)["goes on"]] == [1] and "goes off" not in drawn(tau)
    for axes, name in ((size, "effective_sample_size"), (weight, "max_weight")):
        assert list(drawn(axes).values()) == [logged(log, f"importance/{name}")]
    # On from the switch to the end, in every panel.
    for axes in figure.axes[:-1]:
        (span,) = [patch for patch in axes.patches if patch.get_alpha()]
        assert (span.get_x(), span.get_width()) == (1, 7)
    assert "on in 7 of 8 steps" in figure.get_suptitle()
    # The histogram holds each example drawn once: 7 batches of 16.
    (stairs,) = histogram.patches
    assert trainer.importance_weights().sum() == 7 * 16
    assert sum(stairs.get_data().values) == pytest.approx(1)
    assert titles(plot_training(log, detail=True)) == panels  # a log holds no histogram
    assert titles(plot_training(trainer)) == panels[:2]


def test_the_histogram_counts_weights_by_the_half_octave():
    report = Report(lambda values: values)
    report.weights(torch.tensor([1.0, 1.3, 1.5, 0.99, 1e-9, 1e9]))
    counts = dict(zip(WEIGHT_EDGES, report.weight_counts.tolist(), strict=False))
    assert counts[1.0] == 2 and counts[2**0.5] == 1 and counts[2**-0.5] == 1
    assert report.weight_counts[0] == report.weight_counts[-1] == 1


@pytest.mark.parametrize("method", ["history", "auto"])
def test_a_method_without_a_threshold_is_drawn(tmp_path, method):
    args = toys.arguments(tmp_path, importance_method=method, max_steps=4)
    ours = toys.run(ImportanceTrainer, toys.bert(), args, toys.sentences(64))
    figure = plot_training(ours)
    assert len(figure.axes) == 2 and "threshold" not in drawn(figure.axes[1])


def test_a_method_with_memory_gets_its_panels_and_nothing_is_drawn_twice(trainer):
    more = {"gain": 1.25, "skipped_share": 0.5, "table_age": 7.0, "relative_cost": 0.9, "examples_saved": 8}
    more = {f"importance/{name}": value for name, value in more.items()}
    log = [{**entry, **(more if "loss" in entry else {})} for entry in trainer.state.log_history]
    found = titles(plot_training(log, detail=True))
    assert found[3:5] == ["τ", "measured gain"]
    assert found[-2:] == ["examples skipped", "age of the remembered scores"]
    assert len(found) == 3 + len(DETAILS) == len(set(found))


def test_the_log_of_a_plain_trainer_gives_its_loss(trainer):
    log = [{k: v for k, v in e.items() if not k.startswith("importance/")} for e in trainer.state.log_history]
    figure = plot_training(log)
    assert titles(figure) == [""] and not figure.axes[0].patches


def test_off_again_is_marked_and_not_shaded():
    def entry(step, tau, active, switches, at=None):
        own = {"tau": tau, "tau_threshold": 2.0, "active": active, "switches": switches}
        own |= {f"examples_{name}": 1 for name in ("scored", "trained", "saved")}
        own |= {} if at is None else {"switched_at": at}
        return {"step": step, "loss": 1.0, **{f"importance/{name}": value for name, value in own.items()}}

    # A training log says at which step it last switched; in between it draws otherwise, which is no switch on or off.
    log = [entry(2, 2.0, 0.0, 0), entry(4, 2.2, 1.0, 1, 3), entry(6, 2.1, 1.0, 2, 5), entry(8, 1.7, 0.0, 3, 7)]
    log.append(entry(10, 1.8, 0.0, 3, 7))
    tau = plot_training(log).axes[1]
    assert drawn(tau)["goes on"] == [(3, pytest.approx(2.1))]
    assert drawn(tau)["goes off"] == [(7, pytest.approx(1.9))]
    assert [(p.get_x(), p.get_width()) for p in tau.patches if p.get_alpha()] == [(3, 4)]
    assert tau.get_lines()[0].get_color() == VERMILLION


def test_a_folder_is_a_checkpoint_or_holds_some_and_the_figure_is_saved(trainer, tmp_path):
    output = trainer.args.output_dir
    plot_training(f"{output}/checkpoint-4", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert drawn(plot_training(output).axes[0])["training loss"] == logged(trainer.state.log_history, "loss")
    with pytest.raises(FileNotFoundError, match=r"holds no trainer_state\.json, and no checkpoint in it does"):
        plot_training(tmp_path)
    with pytest.raises(ValueError, match="No entry of the log has a training loss: train for more steps"):
        plot_training([])


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, plots.__name__)
    with pytest.raises(ImportError, match=r"pip install 'hf_importance\[plots\]'"):
        importlib.import_module(plots.__name__)
