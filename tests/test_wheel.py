"""An installed wheel alone trains: no other file of the repository is needed, and no network."""

from importlib import metadata

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

import hf_importance
from hf_importance import ImportanceTrainer, ImportanceTrainingArguments


def test_the_version_is_one():
    assert hf_importance.__version__ == metadata.version("hf_importance")


def test_it_trains(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=4))
    rows = [{"input_ids": [i % 4, *range(10, 15)], "labels": i % 4 if i % 9 else 0} for i in range(64)]
    args = ImportanceTrainingArguments(
        str(tmp_path), max_steps=6, logging_steps=1, report_to="none", use_cpu=True, dataloader_pin_memory=False,
        presample_ratio=3.0, tau_threshold=1.0001, importance_kwargs={"momentum": 0.0}, save_strategy="no",
    )  # fmt: skip
    data, uneven = Dataset.from_list(rows), lambda outputs, labels: 1.0 + labels
    trainer = ImportanceTrainer(model=model, args=args, train_dataset=data, compute_score_func=uneven)
    trainer.train()
    assert trainer.state.global_step == 6
    assert max(entry.get("importance/active_share", 0) for entry in trainer.state.log_history) == 1
