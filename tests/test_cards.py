"""Model cards: what a run writes, and those kept in ``model_cards/``, parsed as the Hub would."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import toys
from huggingface_hub import ModelCard
from test_examples import EXAMPLES, SHORT, language_task
from transformers import Trainer

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.reporting.cards import FIGURE, TAG
from hf_importance.reporting.markdown import table
from hf_importance.reporting.report import outcome

KEPT = sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))


def checked(file: Path) -> ModelCard:
    """Load a card; it must have metadata of the right types, and every picture it shows beside it."""
    card = ModelCard.load(file)  # refuses a block that is no YAML, and results that are no model index
    data = card.data.to_dict()
    assert isinstance(data["tags"], list) and all(isinstance(tag, str) and tag for tag in data["tags"])
    assert TAG in data["tags"]
    for name in ("license", "library_name", "pipeline_tag", "base_model"):
        assert data.get(name) is None or (isinstance(data[name], str) and data[name])
    # What the metadata says and what it says after a round trip are one.
    assert ModelCard(str(card)).data.to_dict() == data
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text):
        assert (file.parent / picture).read_bytes().startswith(b"\x89PNG")
    assert "katharopoulos2018importance" in card.text
    return card


@pytest.fixture
def trainer(tmp_path, digits):
    small = digits.select(range(128))
    return toys.run(ImportanceTrainer, toys.vit(), toys.always_on(tmp_path, kappa=1 / 3), small, eval_dataset=small)


def test_a_run_writes_a_card_with_method_compute_course_arguments_and_paper(trainer, tmp_path):
    evaluation = trainer.evaluate()
    trainer.create_model_card(model_name="digits", license="apache-2.0", baseline={"eval_loss": 1.5})
    card = checked(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and "generated_from_trainer" in card.data.tags
    assert "# digits" in card.text and "### Training hyperparameters" in card.text  # the Trainer's own part
    text = card.text[card.text.index("## Importance sampling") :]
    assert "| optimizer steps | 8 | 8 |" in text
    assert "| of them drawn by importance | 7 | 0 |" in text
    assert "| examples trained on | 128 | 128 |" in text
    assert "| examples scored by a forward pass of their own | 336 | 0 |" in text
    kappa = 1 / 3
    compute = f"| compute (scoring an example is {kappa:.2g} of training on it) | {1 + kappa * 336 / 128:.2f} | 1 |"
    assert compute in text
    assert f"**{outcome(trainer.state.log_history[-2], 8)}**" in text  # in one sentence, how it went
    assert f"]({FIGURE})" in text
    assert f"| `eval_loss` | {evaluation['eval_loss']:.4g} | 1.5 |" in text
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+)` \|$", text[text.index("### Arguments") :], re.MULTILINE))
    assert listed == {
        "presample_ratio": "3.0",
        "tau_threshold": str(1 + 1e-9),
        "importance_log": "all",
        "importance_kwargs": f"{{'momentum': 0.0, 'kappa': {1 / 3}}}",
    }
    # The Hub shows what the last evaluation found.
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type) == ("image-classification", "loss")
    assert result.metric_value == evaluation["eval_loss"]


def test_the_defaults_are_not_listed(tmp_path, digits):
    args = ImportanceTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    ImportanceTrainer(toys.vit(), args, train_dataset=digits).create_model_card()
    assert "All at their defaults." in (tmp_path / "README.md").read_text()


def test_a_second_card_replaces_the_first(trainer, tmp_path):
    trainer.create_model_card()
    first = (tmp_path / "README.md").read_text()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == first
    assert first.count("## Importance sampling") == 1 and first.count(TAG) == 1


def test_without_matplotlib_the_course_of_tau_is_a_table(trainer, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    trainer.create_model_card()
    text = checked(tmp_path / "README.md").text
    logged = [e for e in trainer.state.log_history if "loss" in e]
    for entry in logged:
        assert f"| {entry['step']} | {entry['importance/tau']:.2f} | on |" in text
    assert not (tmp_path / FIGURE).exists()


def test_before_training_the_card_says_what_there_is(tmp_path, digits):
    trainer = ImportanceTrainer(toys.vit(), toys.arguments(tmp_path), train_dataset=digits)
    trainer.create_model_card()
    text = checked(tmp_path / "README.md").text
    assert "### Arguments" in text and "| optimizer steps |" not in text


def test_switched_off_by_the_argument_the_card_is_the_trainers(tmp_path, digits):
    cards = []
    for kind in (Trainer, ImportanceTrainer):
        args = toys.arguments(tmp_path / "same_name", importance_sampling=False)
        kind(toys.vit(), args, train_dataset=digits).create_model_card()
        cards.append((tmp_path / "same_name" / "README.md").read_text())
    assert cards[0] == cards[1]


def test_a_table_with_a_line_too_short_or_too_long_is_refused():
    for line in (["one"], ["one", 2, 3]):
        with pytest.raises(ValueError, match=r"A line has [13] cells and the head 2: \['one'"):
            table(["name", "value"], [["whole", 1], line])


def test_one_command_makes_a_card_of_all_sides(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    made = importlib.import_module("model_cards")
    language_task(tmp_path)
    for folder, name in (("models", "model"), ("data", "data")):
        (tmp_path / "root" / folder).mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / "root" / folder / "tiny")
    given = SHORT.replace("{", '{"kappa":0.3,')
    task = made.Task(
        "Tiny", "About it.", "Nothing.", "language_modeling", "tiny", "tiny", given, "mit", "text-generation"
    )
    monkeypatch.setattr(made, "TASKS", {"tiny": task})
    monkeypatch.setattr(made, "CARDS", tmp_path)
    command = ["--root", tmp_path / "root", "--seeds", 3, "--output_dir", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", ["model_cards.py", *map(str, command)])
    made.main()
    card = checked(tmp_path / "tiny" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} >= {"loss", "accuracy"}
    assert "By eval_accuracy: " in card.text and "of one seed, so there is no interval" in card.text
    assert re.search(r"^\*\*Importance sampling: on in [12] of 3 steps", card.text, re.MULTILINE)
    listed = re.findall(r"^\| `(\w+)` \| `.+` \|$", card.text[card.text.index("### Arguments") :], re.MULTILINE)
    assert listed == ["presample_ratio", "tau_threshold", "importance_kwargs"]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.parent.name)
def test_a_kept_card_names_where_each_of_its_numbers_comes_from(file):
    text = checked(file).text
    for heading in ("## Results", "## How it was made", "## Importance sampling"):
        assert f"\n{heading}\n" in text
    made = text[text.index("## How it was made") :]
    for name in ("Command", "Commit", "Hardware", "Versions", "Seeds", "Baseline"):
        assert re.search(rf"\| {name} \| .+ \|", made), name
    assert re.search(r"\| Commit \| `[0-9a-f]{7}` \|", made)
