"""Makes the cards in ``model_cards/`` anew: each task on all sides of ``hf_importance.compare``, and what came of it.

    python examples/model_cards.py --root path/to/folder_with_data_and_models
    python examples/model_cards.py --root path/to/folder_with_data_and_models --tasks minilm-sst2 --seeds 0 1

All cards with three seeds should take a quarter of an hour of an idle core, half of it MobileNetV2's (added up from
times of single steps). What a card must hold: model_cards/README.md.
"""

import argparse
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerState

from hf_importance.compare import Comparison, compare
from hf_importance.reporting.cards import FIGURE, TAG, importance_section
from hf_importance.reporting.markdown import table
from hf_importance.reporting.plots import plot_training

HERE = Path(__file__).parent
CARDS = HERE.parent / "model_cards"


@dataclass
class Task:
    """A model that an example trains, and what its card says that no run knows."""

    title: str
    about: str
    limits: str
    script: str
    model: str
    dataset: str
    more: str
    license: str
    pipeline_tag: str
    error: str = ""
    language: str | None = "en"


TASKS = {
    "llama_stories260k-shakespeare": Task(
        "A 260 K Llama on Shakespeare",
        "TinyStories Llama of 260 K parameters (MIT), fine-tuned on [tinyshakespeare](https://github.com/karpathy/"
        "char-rnn) (public domain), blocks of 128 tokens.",
        "A demonstration: 100 steps of a model with 260 K parameters.",
        "language_modeling",
        "llama_stories260k",
        "tinyshakespeare",
        "--max_steps 100 --eval_strategy steps --eval_steps 0.5",
        "mit",
        "text-generation",
    ),
    "minilm-sst2": Task(
        "MiniLM on movie review sentences",
        "all-MiniLM-L6-v2 (Apache-2.0), fine-tuned on 400 sentences of film reviews, positive or negative ([SST-2 "
        "sentences](https://github.com/clairett/pytorch-sentiment-classification)).",
        "A demonstration: 400 training sentences, 300 test sentences.",
        "text_classification",
        "minilm-l6-h384-fp16",
        "sst2_sentences",
        "--eval_split test --max_train_examples 400 --max_eval_examples 300 --per_device_train_batch_size 16 "
        "--num_train_epochs 2 --eval_strategy epoch",
        "apache-2.0",
        "text-classification",
        "An accuracy of 300 sentences has a standard error of 2.2 points.",
    ),
    "minilm-wnut17": Task(
        "MiniLM on emerging entities",
        "all-MiniLM-L6-v2 (Apache-2.0), fine-tuned on 320 sentences of [WNUT-17](https://github.com/leondz/"
        "emerging_entities_17) (CC BY 4.0), 13 tags.",
        "A demonstration: 320 training sentences and two epochs, far too few for a useful tagger.",
        "token_classification",
        "minilm-l6-h384-fp16",
        "wnut17_ner",
        "--eval_split test --max_train_examples 320 --max_eval_examples 300 --num_train_epochs 2 "
        "--eval_strategy epoch",
        "apache-2.0",
        "token-classification",
    ),
    "mobilenet_v2-clothing10": Task(
        "MobileNetV2 0.35 on clothing photos",
        "MobileNetV2 of width 0.35, ImageNet weights (Keras applications, Apache-2.0), fine-tuned on 256 photos of "
        "clothes in 10 classes ([clothing-dataset-small](https://github.com/alexeygrigorev/clothing-dataset-small), "
        "CC0).",
        "A demonstration: 256 training photos, 372 test photos; the classes are confusable and unbalanced.",
        "image_classification",
        "mobilenet_v2_0.35_imagenet",
        "clothing10_128px",
        "--eval_split test --max_train_examples 256 --num_train_epochs 8 --eval_strategy steps --eval_steps 0.25 "
        "--batch_norm frozen --learning_rate 3e-4",
        "apache-2.0",
        "image-classification",
        "An accuracy of 372 photos has a standard error of 2.2 points.",
        None,
    ),
}


def card(name: str, task: Task, found: Comparison, folder: Path, seeds: list[int], commit: str) -> ModelCard:
    """Put together what the runs found, how they were made, and the section on the first run by importance."""
    run = folder / f"importance-{seeds[0]}"
    log = TrainerState.load_from_json(str(run / "trainer_state.json")).log_history
    plot_training(log, CARDS / name / FIGURE)
    section = importance_section(torch.load(run / "training_args.bin", weights_only=False), log, FIGURE)
    results = ModelCard.load(run / "README.md").data.eval_results or []
    for result in results:
        result.dataset_type = result.dataset_name = task.dataset
    data = ModelCardData(
        model_name=name,
        language=task.language,
        license=task.license,
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        tags=["generated_from_trainer", TAG],
        eval_results=results,
    )
    names = ("hf_importance", "torch", "transformers", "accelerate", "datasets")
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in names)
    where = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} shared CPU cores, one used"
    )
    command = f"python -m hf_importance.compare examples/{task.script}.py --seeds {' '.join(map(str, seeds))}"
    given = f"--model models/{task.model} --dataset data/{task.dataset} {task.more}"
    made = {
        "Command": f"`{command} {given}`",
        "Commit": f"`{commit}`",
        "Hardware": where,
        "Versions": f"Python {platform.python_version()}, {versions}",
        "Seeds": f"{', '.join(map(str, seeds))}; the metadata and the section below are of seed {seeds[0]}",
        "Baseline": "`plain`: the same script with `--importance_sampling false`; `short`: with as many steps as ours "
        "cost; `small`: with the batch that costs as much",
    }
    parts = [
        f"# {task.title}",
        task.about,
        "## Results",
        f"Importance sampling {found.verdict()}"
        if "stayed off" in found.verdict()
        else f"By {found.metric}: {found.verdict()}",
        f"```text\n{found.table()}\n```",
        f"{task.error} Seconds are of a machine that other work shared, and say little.".strip(),
        f"## How it was made\n\n{table(('', ''), made.items(), text=2)}",
        section,
        f"## What it is not good for\n\n{task.limits}",
    ]
    return ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n\n".join(parts) + "\n")


def in_this_process(script: str, forwarded: Sequence[str], reuse: bool) -> Callable[..., TrainerState]:
    """Give what runs a script as ``hf_importance.compare`` would, but without a start of Python for each run.

    Starting takes as long as the shortest of these runs; the arguments, and so the outcome, are the same.
    """

    def train(**changes: object) -> TrainerState:
        file = Path(str(changes["output_dir"]), "trainer_state.json")
        if not (reuse and file.exists()):
            flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
            sys.argv = [script, *forwarded, *flags]
            runpy.run_path(script, run_name="__main__")
        return TrainerState.load_from_json(str(file))

    return train


def main() -> None:
    """Run, and write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="Holds data/ and models/.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/model_cards"))
    parser.add_argument("--reuse", action="store_true", help="Take the runs that the output folder has, as they are.")
    settings = parser.parse_args()
    # Of the runs, not of what is committed while they go on.
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    for name in settings.tasks:
        task, folder = TASKS[name], settings.output_dir / name
        forwarded = ["--model", str(settings.root / "models" / task.model), *task.more.split()]
        forwarded += ["--dataset", str(settings.root / "data" / task.dataset), "--disable_tqdm", "true"]
        train = in_this_process(str(HERE / f"{task.script}.py"), forwarded, settings.reuse)
        found = compare(train, settings.seeds, output_dir=folder)
        print(f"\n{found}\n")
        found.write(folder)
        (CARDS / name).mkdir(exist_ok=True)
        card(name, task, found, folder, settings.seeds, commit).save(CARDS / name / "README.md")


if __name__ == "__main__":
    main()
