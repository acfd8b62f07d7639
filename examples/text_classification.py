"""Fine-tune a classifier of texts, or of pairs of texts, by importance.

Any dataset with one or two columns of text and one of classes, any model of ``AutoModelForSequenceClassification``.
One process, or ``accelerate launch``; ``--importance_sampling false`` is the baseline::

    python examples/text_classification.py --output_dir out --model bert-base-uncased --dataset rotten_tomatoes
    python examples/text_classification.py --output_dir out --model path/to/model --dataset path/to/parquet_files

What came of it on sentences of film reviews, beside plain training: model_cards/minilm-sst2.
"""

import torch
from common import Task, load_metric, load_splits, parse, train_and_save
from datasets import ClassLabel, Value
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments

DEFAULTS = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "num_train_epochs": 3,
}


def main(task: Task, args: ImportanceTrainingArguments) -> None:
    """Load, train, evaluate."""
    train, test = load_splits(task)
    columns = train.features
    label = next(name for name, feature in columns.items() if isinstance(feature, ClassLabel))
    texts = [name for name, feature in columns.items() if feature == Value("string")][:2]
    tokenizer = AutoTokenizer.from_pretrained(task.model)

    def tokenize(rows: dict) -> dict:
        return tokenizer(*(rows[text] for text in texts), truncation=True)

    train, test = (
        split.map(tokenize, batched=True, remove_columns=texts).rename_column(label, "labels")
        for split in (train, test)
    )
    accuracy = load_metric(
        task, "accuracy", lambda predictions, references: {"accuracy": accuracy_score(references, predictions)}
    )

    def metrics(found: EvalPrediction) -> dict[str, float]:
        return accuracy(predictions=found.predictions.argmax(-1), references=found.label_ids)

    names = columns[label].names
    model = AutoModelForSequenceClassification.from_pretrained(
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
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    main(*parse(__doc__, **DEFAULTS))
