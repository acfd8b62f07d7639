"""Fine-tune an image classifier by importance.

Any dataset with a column of images and one of classes, any model of ``AutoModelForImageClassification``. One
process, or ``accelerate launch``; ``--importance_sampling false`` is the baseline::

    python examples/image_classification.py --output_dir out --model google/vit-base-patch16-224 --dataset food101
    python examples/image_classification.py --output_dir out --model path/to/model --dataset path/to/parquet_files

What came of it on photos of clothes, beside plain training: model_cards/mobilenet_v2-clothing10.
"""

import torch
from common import Task, load_metric, load_splits, parse, train_and_save
from datasets import ClassLabel, Dataset, Image
from sklearn.metrics import accuracy_score
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments

DEFAULTS = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "num_train_epochs": 6,
    # The model does not know the column that its pixels are made of.
    "remove_unused_columns": False,
}


def prepare(data: Dataset, processor, image: str, label: str) -> Dataset:
    """Make pixels of the images when a batch asks for them."""

    def transform(rows: dict) -> dict:
        pictures = [picture.convert("RGB") for picture in rows[image]]
        return {**processor(pictures, return_tensors="pt"), "labels": rows[label]}

    return data.with_transform(transform)


def load_model(name: str, labels: list[str]) -> torch.nn.Module:
    """Load the model with a new head."""
    model = AutoModelForImageClassification.from_pretrained(
        name, num_labels=len(labels), id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
    )
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            # torch's own; transformers' MobileNetV2 has 0.997, running statistics of almost the last batch alone.
            layer.momentum = 0.1
    return model


def main(task: Task, args: ImportanceTrainingArguments) -> None:
    """Load, train, evaluate."""
    train, test = load_splits(task)
    columns = train.features
    image = next(name for name, feature in columns.items() if isinstance(feature, Image))
    label = next(name for name, feature in columns.items() if isinstance(feature, ClassLabel))
    processor = AutoImageProcessor.from_pretrained(task.model)
    accuracy = load_metric(
        task, "accuracy", lambda predictions, references: {"accuracy": accuracy_score(references, predictions)}
    )

    def metrics(found: EvalPrediction) -> dict[str, float]:
        return accuracy(predictions=found.predictions.argmax(-1), references=found.label_ids)

    trainer = ImportanceTrainer(
        model=load_model(task.model, columns[label].names),
        args=args,
        train_dataset=prepare(train, processor, image, label),
        eval_dataset=prepare(test, processor, image, label),
        processing_class=processor,
        compute_metrics=metrics,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    main(*parse(__doc__, **DEFAULTS))
