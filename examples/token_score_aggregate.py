"""How well does an example's score follow its true gradient norm when it is made of many tokens' scores?

Two aggregates of the token norms are compared on a fine-tuned model: their sum, which bounds the norm of the sum, and
the root of the sum of their squares, its norm where token gradients are uncorrelated. ``gain`` is what sampling by a
score divides the gradient's second moment by, with the true gradient norm as the best possible score::

    python examples/token_score_aggregate.py --model llama_stories260k --dataset tinyshakespeare
    python examples/token_score_aggregate.py --model minilm-l6-h384-fp16 --dataset wnut17_ner

A folder with ``train.txt`` trains a causal language model on pieces of different lengths, one with ``train.parquet``
(columns ``tokens`` and ``ner_tags``) a token classifier.
"""

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_importance.heads.scores import gradient_norm, root_of_squares, sum_of_norms
from hf_importance.heads.tasks import TokenHead
from hf_importance.objective.scorer import evaluation_mode
from hf_importance.reporting.markdown import table


@dataclass
class Arguments:
    """What is measured."""

    model: str = field(metadata={"help": "Folder of a pretrained model."})
    dataset: str = field(metadata={"help": "Folder of the data."})
    steps: int = field(default=200, metadata={"help": "Steps of fine-tuning before measuring, 16 examples each."})
    examples: int = field(default=400, metadata={"help": "Examples measured."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the fine-tuning."})
    seed: int = field(default=0, metadata={"help": "Of the data's order, the pieces, and the training."})


def pieces_of_text(text: str, tokenizer, count: int) -> Dataset:
    """Cut pieces of 20 to 400 characters, uniformly in length, for a causal language model."""
    rows = []
    for _ in range(count):
        start, length = random.randrange(len(text) - 400), random.randint(20, 400)
        tokens = tokenizer(text[start : start + length])["input_ids"]
        rows.append({"input_ids": tokens, "labels": tokens})
    return Dataset.from_list(rows)


def tagged_words(data: Dataset, tokenizer) -> Dataset:
    """Give each word's tag to its first token."""

    def encode(row: dict) -> dict:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=128)
        words = encoded.word_ids()
        first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
        tags = [row["ner_tags"][word] if new else -100 for word, new in zip(words, first, strict=True)]
        return {**encoded, "labels": tags}

    return data.map(encode, remove_columns=data.column_names)


def measure(model, shift: bool, data: Dataset, collate) -> dict[str, torch.Tensor]:
    """Score every example, and take its true gradient norm, by one backward pass each."""
    found: dict[str, list] = {"sum of norms": [], "root of squares": [], "loss": [], "tokens": [], "true": []}
    head, summing = (TokenHead(shift, 0.0, aggregate) for aggregate in (root_of_squares, sum_of_norms))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluation_mode(model):
        for i in range(len(data)):
            batch = collate([data[i]])
            outputs = model(**head.model_inputs(batch))
            loss = head.losses(outputs, batch)
            found["sum of norms"].append(summing.upper_bound(outputs, batch))
            found["root of squares"].append(head.upper_bound(outputs, batch))
            found["loss"].append(loss.detach())
            found["tokens"].append(head.items(batch).view(1).float())
            found["true"].append(gradient_norm([loss.sum()], parameters))
    return {name: torch.cat(values).double() for name, values in found.items()}


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation."""
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def gain(score: torch.Tensor, true: torch.Tensor) -> float:
    """What sampling by ``score`` divides the second moment of the gradient by, E_p[(g / (N p))²]."""
    return (true.square().mean() / (score.mean() * (true.square() / score).mean())).item()


def main() -> None:
    """Fine-tune, measure, print."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    folder = Path(arguments.dataset)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    language_model = (folder / "train.txt").exists()
    if language_model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        data = pieces_of_text((folder / "train.txt").read_text(), tokenizer, 16 * arguments.steps + arguments.examples)
    else:
        raw = Dataset.from_parquet(str(folder / "train.parquet"))
        classes = 1 + max(max(tags, default=0) for tags in raw["ner_tags"])
        model = AutoModelForTokenClassification.from_pretrained(
            arguments.model, dtype=torch.float32, num_labels=classes
        )
        data = tagged_words(raw, tokenizer)
    collate = DataCollatorForTokenClassification(tokenizer)
    measured = data.select(range(arguments.examples))
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        report_to="none",
        save_strategy="no",
    )
    Trainer(model, args, train_dataset=data, data_collator=collate).train()

    found = measure(model, language_model, measured, collate)
    true = found["true"]
    rank = {name: values.argsort().argsort().double() for name, values in found.items()}
    lines = []
    for name in ("sum of norms", "root of squares", "loss", "tokens", "true"):
        pearson, spearman = correlation(found[name], true), correlation(rank[name], rank["true"])
        lines.append([name, f"{pearson:.3f}", f"{spearman:.3f}", f"{gain(found[name], true):.3f}"])
    print(table(["score", "Pearson", "Spearman", "gain"], lines))


if __name__ == "__main__":
    main()
