r"""Fine-tune a causal language model by importance.

Any dataset with a column ``text``, or text files; the texts are joined and cut into blocks. One process, or
``accelerate launch``; ``--importance_sampling false`` is the baseline::

    python examples/language_modeling.py --output_dir out --model gpt2 --dataset Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1
    python examples/language_modeling.py --output_dir out --model path/to/model --dataset path/to/text_files

What came of it on Shakespeare, beside plain training: model_cards/llama_stories260k-shakespeare.
"""

import math
from itertools import chain

import torch
from common import Task, load_metric, load_splits, parse, train_and_save
from sklearn.metrics import accuracy_score
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, default_data_collator

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments

BLOCK = 128  # tokens
DEFAULTS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
}


def main(task: Task, args: ImportanceTrainingArguments) -> None:
    """Load, train, evaluate."""
    train, test = load_splits(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)

    def to_blocks(rows: dict) -> dict:
        lines = tokenizer([text + "\n" for text in rows["text"]], add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable(lines))
        blocks = [tokens[start : start + BLOCK] for start in range(0, len(tokens) - BLOCK + 1, BLOCK)]
        return {"input_ids": blocks, "labels": blocks}

    train, test = (split.map(to_blocks, batched=True, remove_columns=split.column_names) for split in (train, test))
    accuracy = load_metric(
        task, "accuracy", lambda predictions, references: {"accuracy": accuracy_score(references, predictions)}
    )

    def metrics(found: EvalPrediction) -> dict[str, float]:
        # The token at a position is predicted from those before it.
        return accuracy(predictions=found.predictions[:, :-1].ravel(), references=found.label_ids[:, 1:].ravel())

    trainer = ImportanceTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=metrics,
        # The most likely token alone: the logits of a whole evaluation would not fit into memory.
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    print(f"perplexity: {math.exp(train_and_save(trainer)['eval_loss']):.3f}")


if __name__ == "__main__":
    main(*parse(__doc__, **DEFAULTS))
