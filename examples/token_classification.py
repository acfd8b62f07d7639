"""Fine-tune a tagger of words (named entities, parts of speech) by importance.

Any dataset with a column of words and one of tags, any model of ``AutoModelForTokenClassification`` with a fast
tokenizer. One process, or ``accelerate launch``; ``--importance_sampling false`` is the baseline::

    python examples/token_classification.py --output_dir out --model bert-base-cased --dataset tner/wnut2017
    python examples/token_classification.py --output_dir out --model path/to/model --dataset path/to/parquet_files

What came of it on WNUT-17, beside plain training: model_cards/minilm-wnut17.
"""

from itertools import chain

import torch
from common import Task, load_metric, load_splits, parse, train_and_save
from datasets import ClassLabel, List
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
)

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments

IGNORED = -100
DEFAULTS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "num_train_epochs": 3,
}


def f1_of_words(predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    """Micro F1 over words that carry a tag other than O; not the F1 of whole entities that seqeval gives."""
    found, true = list(chain.from_iterable(predictions)), list(chain.from_iterable(references))
    tags = sorted({*found, *true} - {"O"})
    return {"word_f1": float(f1_score(true, found, labels=tags, average="micro", zero_division=0))}


def main(task: Task, args: ImportanceTrainingArguments) -> None:
    """Load, train, evaluate."""
    train, test = load_splits(task)
    tags = next(
        name for name, f in train.features.items() if isinstance(f, List) and isinstance(f.feature, ClassLabel)
    )
    names = train.features[tags].feature.names
    tokenizer = AutoTokenizer.from_pretrained(task.model)

    def tokenize(rows: dict) -> dict:
        encoded = tokenizer(rows["tokens"], truncation=True, is_split_into_words=True)
        encoded["labels"] = []
        for row, word_tags in enumerate(rows[tags]):
            words = encoded.word_ids(row)
            # A word's first token carries its tag, the others none.
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            encoded["labels"].append(
                [word_tags[word] if starts else IGNORED for word, starts in zip(words, first, strict=True)]
            )
        return encoded

    train, test = (split.map(tokenize, batched=True, remove_columns=split.column_names) for split in (train, test))
    metric = load_metric(task, "seqeval", f1_of_words)

    def metrics(found: EvalPrediction) -> dict[str, float]:
        kept = found.label_ids != IGNORED
        rows = zip(found.predictions.argmax(-1), found.label_ids, kept, strict=True)
        pairs = [([names[tag] for tag in p[k]], [names[tag] for tag in r[k]]) for p, r, k in rows]
        scores = metric(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
        return {name: value for name, value in scores.items() if not isinstance(value, dict)}

    model = AutoModelForTokenClassification.from_pretrained(
        task.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    trainer = ImportanceTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    main(*parse(__doc__, **DEFAULTS))
