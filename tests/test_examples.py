"""The task scripts, run on tiny data with tiny models; and on real data, where it is."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from test_quickstart import SIZES, image_task, text_task
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast, GPT2Config, GPT2LMHeadModel

EXAMPLES = Path(__file__).parents[1] / "examples"
# Three steps, on from the second.
SHORT = (
    "--max_steps 3 --per_device_train_batch_size 8 --presample_ratio 3 --tau_threshold 1.0000001 "
    '--importance_kwargs {"momentum":0} --disable_tqdm true'
)
# Folders of data and models to try the scripts on, with the names that the model cards use.
REAL = os.environ.get("HF_IMPORTANCE_DATA")
REAL_TASKS = {
    "image_classification": ("mobilenet_v2_0.35_imagenet", "clothing10_128px"),
    "text_classification": ("minilm-l6-h384-fp16", "sst2_sentences"),
    "token_classification": ("minilm-l6-h384-fp16", "wnut17_ner"),
    "language_modeling": ("llama_stories260k", "tinyshakespeare"),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "anna", "rome", "went", "to", "##me"]
# With the usual initialisation all scores are equal to six digits, and tau is 1 to rounding.
SPREAD = {"vocab_size": len(WORDS), "initializer_range": 0.5}


def token_task(folder):
    """Give a tiny BERT, and sentences whose names are tagged; one of them is two tokens long."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder / "model")
    BertForTokenClassification(BertConfig(**SIZES, **SPREAD)).save_pretrained(folder / "model")
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-per", "B-loc"]))})
    rows = {
        "tokens": [["anna", "went", "to", "rome"], ["rome"], ["anname", "went"]] * 16,
        "tags": [[1, 0, 0, 2], [2], [1, 0]] * 16,
    }
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}.parquet")


def language_task(folder):
    """Give a tiny GPT-2, and text files of some hundred tokens."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder / "model")
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **SPREAD))
    model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, lines in (("train", 1500), ("validation", 200)):
        text = "\n".join(("anna went to rome", "rome rome", "to anna to")[i * i % 3] for i in range(lines))
        (folder / "data" / f"{split}.txt").write_text(text)


TASKS = {
    "image_classification": (image_task, "eval_accuracy"),
    "text_classification": (text_task, "eval_accuracy"),
    "token_classification": (token_task, "eval_word_f1"),
    "language_modeling": (language_task, "eval_accuracy"),
}


def run(monkeypatch, script, *arguments):
    """Run a script as ``python script arguments`` does, in this process: it saves the imports."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")


def given(task, tmp_path):
    TASKS[task][0](tmp_path)
    split = ["--eval_split", "test"] if task == "text_classification" else []
    return ["--model", tmp_path / "model", "--dataset", tmp_path / "data", *split, *SHORT.split()]


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.py")), ids=lambda script: script.stem)
def test_a_script_uses_public_names_alone(script):
    assert re.findall(r"\w\._[a-z]\w*", script.read_text()) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_task_script_trains_by_importance_and_its_baseline_without(task, tmp_path, monkeypatch):
    arguments = given(task, tmp_path)
    run(monkeypatch, task, *arguments, "--output_dir", tmp_path / "ours", "--max_train_examples", 1400)
    ours = results(tmp_path / "ours")
    # Almost equal scores: it may go off again after the second step.
    assert ours["importance/steps_on"] in (1, 2)
    assert ours["importance/examples_scored"] == ours["importance/steps_on"] * 3 * 8
    assert 0 <= ours[TASKS[task][1]] <= 1
    for file in ("model.safetensors", "trainer_state.json", "README.md", "importance_sampling.png"):
        assert (tmp_path / "ours" / file).exists()
    baseline = ["--output_dir", tmp_path / "plain", "--importance_sampling", "false"]
    run(monkeypatch, task, *arguments, *baseline)
    plain = results(tmp_path / "plain")
    assert not any(name.startswith("importance/") for name in plain)
    assert plain.keys() == {name for name in ours if not name.startswith("importance/")}


def test_a_words_tag_stands_at_its_first_token(tmp_path, monkeypatch):
    arguments = given("token_classification", tmp_path)
    seen = []
    import hf_importance

    class Spy(hf_importance.ImportanceTrainer):
        def __init__(self, *args, train_dataset, **kwargs):
            seen.extend(train_dataset[:3]["labels"])
            super().__init__(*args, train_dataset=train_dataset, **kwargs)

    monkeypatch.setattr(hf_importance, "ImportanceTrainer", Spy)
    run(monkeypatch, "token_classification", *arguments, "--output_dir", tmp_path / "out")
    assert seen == [[-100, 1, 0, 0, 2, -100], [-100, 2, -100], [-100, 1, -100, 0, -100]]


def test_a_metric_of_evaluate_is_taken_from_a_folder(tmp_path, monkeypatch):
    script = tmp_path / "halved" / "halved.py"
    script.parent.mkdir()
    script.write_text(
        "import datasets\nimport evaluate\n\n\nclass Halved(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        number = datasets.Value('int64')\n"
        "        features = datasets.Features(predictions=number, references=number)\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'halved': sum(p == r for p, r in zip(predictions, references)) / len(references) / 2}\n"
    )
    arguments = given("text_classification", tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run(monkeypatch, "text_classification", *arguments, "--output_dir", tmp_path / "out", "--metric", script.parent)
    found = results(tmp_path / "out")
    assert 0 <= found["eval_halved"] <= 0.5 and "eval_accuracy" not in found


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path, monkeypatch):
    arguments = given("text_classification", tmp_path)
    with pytest.raises(ValueError, match=r"has no split 'dev', only (train, test|test, train)"):
        run(monkeypatch, "text_classification", *arguments, "--eval_split", "dev", "--output_dir", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="HF_IMPORTANCE_DATA names no folder with data/ and models/")
@pytest.mark.parametrize("task", REAL_TASKS)
def test_a_task_script_runs_on_real_data(task, tmp_path, monkeypatch):
    model, data = REAL_TASKS[task]
    arguments = ["--model", Path(REAL, "models", model), "--dataset", Path(REAL, "data", data), *SHORT.split()]
    run(monkeypatch, task, *arguments, "--max_eval_examples", 64, "--output_dir", tmp_path)
    assert results(tmp_path)["importance/steps_on"] >= 1
