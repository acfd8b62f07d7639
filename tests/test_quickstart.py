"""The README's first command: it runs offline, says what it measured and where the rest is, and takes other tasks."""

import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHORT = ["--max_steps", "12", "--presample_ratio", "3", "--tau_threshold", "1.0001"]
SHORT += ["--importance_kwargs", '{"momentum": 0}']
# "name  training loss  test error  steps  seconds  examples backpropagated  examples scored"
ROW = re.compile(r"^(\w[\w, ]*?) +([\d.]+) +([\d.]+)% +(\d+) +([\d.]+) +([\d,]+) +([\d,]+)$", re.MULTILINE)


def quickstart(output_dir, *arguments):
    """Run it as a user does, in an empty folder; give what it printed and its table by row."""
    output_dir.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output_dir / "cache")}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=output_dir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = {
        name: [float(number.replace(",", "")) for number in numbers] for name, *numbers in ROW.findall(done.stdout)
    }
    return done.stdout, table, done.stderr


def write_splits(folder, rows, features):
    folder.mkdir()
    for split, start in (("train", 0), ("test", 128)):
        part = {name: values[start : start + 128] for name, values in rows.items()}
        Dataset.from_dict(part, features=features).to_parquet(folder / f"{split}.parquet")


def text_task(folder):
    """Give a tiny BERT with a tokenizer, and sentences whose first word tells the class."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "play", "book"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder / "model")
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder / "model")
    labels = [i % 2 for i in range(160)]
    texts = [f"{('bad', 'good')[label]} " + "film play book"[: 4 + i % 11] for i, label in enumerate(labels)]
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    write_splits(folder / "data", {"sentence": texts, "label": labels}, features)


def image_task(folder):
    """Give a tiny ViT with its image processor, and dark and bright pictures; no test labels, but a validation set."""
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)).save_pretrained(folder / "model")
    labels = [i % 3 for i in range(160)]
    images = [np.full((10, 10), 80 * label + i % 40, dtype=np.uint8) for i, label in enumerate(labels)]
    features = Features({"img": Image(), "fine_label": ClassLabel(num_classes=3)})
    write_splits(folder / "data", {"img": images, "fine_label": labels}, features)
    hidden = Dataset.from_dict({"img": images[:4], "fine_label": [-1] * 4}, features=features)
    (folder / "data" / "test.parquet").rename(folder / "data" / "validation.parquet")
    hidden.to_parquet(folder / "data" / "test.parquet")


def test_it_prints_both_sides_and_writes_figure_and_logs_where_it_says(tmp_path):
    output, table, stderr = quickstart(tmp_path / "here", "--pretraining_steps", "5", *SHORT)
    plain, ours, longer = table["Trainer"], table["ImportanceTrainer"], table["Trainer, same compute"]
    assert plain[2:3] + plain[4:] == [12, 12 * 64, 0]
    assert ours[2] == 12 and ours[4] == 12 * 64
    pools, rest = divmod(ours[5], 3 * 64)
    assert 1 <= pools < 12 and rest == 0
    # A scored example counts as a third of one trained on, so a pool of three batches as one more step.
    assert longer[2] == 12 + pools
    assert "importance sampling on after step" in output + stderr
    assert "tau=1." in stderr  # in the progress bar
    folder = tmp_path / "here" / "runs" / "quickstart"
    assert "runs/quickstart/quickstart.png" in output
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    for run in ("Trainer", "ImportanceTrainer", "Trainer,_same_compute"):
        assert list((folder / run).rglob("events.out.tfevents.*"))


def run_task(folder, make_task, *arguments):
    make_task(folder)
    task = ["--model", str(folder / "model"), "--dataset", str(folder / "data"), "--output_dir", "out"]
    output, table, _ = quickstart(folder / "here", *task, *arguments)
    assert table["Trainer"][2:3] + table["Trainer"][4:] == [12, 12 * 32, 0]
    assert (folder / "here" / "out" / "quickstart.png").exists()
    return output, table


def test_it_takes_a_model_and_pictures_from_folders(tmp_path):
    _, table = run_task(tmp_path, image_task, "--learning_rate", "1e-2", *SHORT)
    assert table["ImportanceTrainer"][5] > 0


def test_it_takes_a_model_and_text_from_folders_and_says_where_it_never_switches_on(tmp_path):
    output, table = run_task(tmp_path, text_task, "--max_steps", "12")
    loss, error, steps, _, trained, scored = table["ImportanceTrainer"]
    assert table["Trainer"][:3] + table["Trainer"][4:] == [loss, error, steps, trained, scored]
    assert "never switched on" in output and len(table) == 2


@pytest.mark.parametrize("given", [{"model": "a"}, {"dataset": "a"}])
def test_a_model_without_a_dataset_is_refused_and_the_reverse(given):
    with pytest.raises(ValueError, match=r"Give both or neither: --model is (a|None), --dataset is (None|a)\."):
        runpy.run_path(str(SCRIPT))["Task"](**given)


@pytest.mark.slow
def test_the_default_takes_less_than_two_minutes_and_goes_on(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output, table, stderr = quickstart(tmp_path / "here")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, with one thread: on a machine that does other things as well, a clock on the wall says more.
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 120
    assert "importance sampling on after step" in output + stderr
    assert table["ImportanceTrainer"][5] > 0
    # The tiny ViT solves the digits; which side does better is for the table to say.
    assert all(row[0] < 0.05 and row[1] < 10 for row in table.values())
