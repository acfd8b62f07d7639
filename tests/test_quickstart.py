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

from hf_importance.compare import SIDES

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHORT = ["--max_steps", "12", "--presample_ratio", "3", "--tau_threshold", "1.0001"]
SHORT += ["--importance_kwargs", '{"momentum": 0, "kappa": 0.25}', "--seeds", "0"]
# "side  steps  batch  compute  seconds  loss  error", of one seed
ROW = re.compile(rf"^({'|'.join(SIDES)}) +" + r" +".join([r"([\d.e-]+)"] * 6) + "$", re.MULTILINE)


def quickstart(output_dir, *arguments):
    """Run it as a user does, in an empty folder; give what it printed and its table by row."""
    output_dir.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output_dir / "cache")}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=output_dir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, {side: list(map(float, numbers)) for side, *numbers in ROW.findall(done.stdout)}, done.stderr


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


def test_it_prints_all_sides_a_verdict_and_how_the_run_went_and_writes_where_it_says(tmp_path):
    output, table, stderr = quickstart(tmp_path / "here", "--pretraining_steps", "5", *SHORT)
    assert table["plain"][:3] == [12, 32, 1]
    (on,) = re.findall(r"Importance sampling: on in (\d+) of 12 steps", output)
    compute = 1 + int(on) * 3 * 0.25 / 12  # a pool of three batches is scored at a quarter each
    assert table["importance"][:3] == [12, 32, pytest.approx(compute, abs=0.01)]
    assert table["short"][:2] == [round(12 * compute), 32]
    assert table["small"][:2] == [12, round(32 * compute)]
    assert "Verdict, by eval_error: " in output and "of one seed, so there is no interval" in output
    assert "IS on (τ 1." in stderr  # in the progress bar
    folder = tmp_path / "here" / "runs" / "quickstart"
    assert "runs/quickstart/quickstart.png" in output
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    for side in SIDES:
        assert list((folder / f"{side}-0").rglob("events.out.tfevents.*"))


def run_task(folder, make_task, *arguments):
    make_task(folder)
    task = ["--model", str(folder / "model"), "--dataset", str(folder / "data"), "--output_dir", "out"]
    output, table, _ = quickstart(folder / "here", *task, *arguments)
    assert table["plain"][:3] == [12, 32, 1]
    assert (folder / "here" / "out" / "quickstart.png").exists()
    return output, table


def test_it_takes_a_model_and_pictures_from_folders(tmp_path):
    _, table = run_task(tmp_path, image_task, "--learning_rate", "1e-2", *SHORT)
    assert table["importance"][2] > 1


def test_it_takes_a_model_and_text_from_folders_and_says_where_it_never_switches_on(tmp_path):
    output, table = run_task(tmp_path, text_task, "--max_steps", "12", "--seeds", "0")
    for side in SIDES[1:]:
        assert table[side][:3] + table[side][4:] == table["plain"][:3] + table["plain"][4:]
    assert "stayed off: identical runs" in output and "never on in 12 steps" in output


@pytest.mark.parametrize("given", [{"model": "a"}, {"dataset": "a"}])
def test_a_model_without_a_dataset_is_refused_and_the_reverse(given):
    with pytest.raises(ValueError, match=r"Give both or neither: --model is (a|None), --dataset is (None|a)\."):
        runpy.run_path(str(SCRIPT))["Task"](**given)


@pytest.mark.slow
def test_the_default_takes_less_than_a_minute_of_the_processor_and_goes_on(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output, *_ = quickstart(tmp_path / "here")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60  # other programs do not count
    assert len(re.findall(r"Importance sampling: on in \d+ of", output)) == 3
    assert re.search(r"^Verdict, by eval_error: .* \(±[\d.]+, 95 % over 3 seeds\)", output, re.MULTILINE)
