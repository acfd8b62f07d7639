r"""What is worth remembering: the gain that each predictor of tomorrow's score would have had, on real training runs.

A task of ``remembered_scores.py`` is trained uniformly, and every visit of an example writes down its score and what
reached the head (the input of the model's last linear layer, in half precision). From what was known when an epoch
began, each predictor then proposes probabilities for it, calibrated on the epoch before, and its gain is measured on
the scores that the epoch found: the second moment of uniform sampling over that of the proposal, 1 for no gain::

    python examples/memory_predictors.py --data path/to/data --models path/to/models --tasks fashion clothing sst2

Results stand in docs/history.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from remembered_scores import TASKS, Task
from torch import Tensor, nn

from hf_importance import ImportanceTrainer, ImportanceTrainingArguments
from hf_importance.batches.entries import IGNORED_LABEL, INDEX
from hf_importance.heads.scores import upper_bound
from hf_importance.reporting.markdown import table
from hf_importance.theory.calibration import calibrate

SHARE = 0.1  # ε, History's default


class Tracing(ImportanceTrainer):
    """Trains uniformly and keeps, by epoch, each example's score, its head's input, and the head itself."""

    def __init__(self, head: nn.Linear, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head, self.epochs, self.seen = head, [], None
        head.register_forward_pre_hook(lambda _, inputs: setattr(self, "seen", inputs[0].detach()))

    def begin_epoch(self, examples: int) -> None:
        """Start the notes of an epoch."""
        self.epochs.append(
            {
                "scores": torch.full((examples,), torch.nan),
                "inputs": torch.zeros((examples, self.head.in_features), dtype=torch.float16),
                "weight": self.head.weight.detach().clone(),
                "bias": self.head.bias.detach().clone(),
            }
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and write down what the forward pass showed."""
        index, labels = inputs[INDEX], inputs["labels"]
        examples = len(self.train_dataset)
        if not self.epochs or not self.epochs[-1]["scores"][index].isnan().all():
            self.begin_epoch(examples)
        found = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            logits = nn.functional.linear(self.seen, self.head.weight, self.head.bias)
            self.epochs[-1]["scores"][index] = upper_bound(logits, labels)
            self.epochs[-1]["inputs"][index] = self.seen.half()
        return found


def gain(proposal: Tensor, found: Tensor) -> float:
    """Second moment of uniform sampling over that of the proposal, mixed with ε of uniform."""
    relative = (1 - SHARE) * proposal / proposal.mean() + SHARE
    squares = found.double().square()
    return float(squares.mean() / (squares / relative).mean())


def predictors(epochs: list[dict[str, Tensor]], epoch: int, labels: Tensor) -> dict[str, Tensor]:
    """Give what each predictor makes of the notes of earlier epochs, when ``epoch`` begins."""
    last = epochs[epoch - 1]["scores"]
    before = epochs[epoch - 2]["scores"] if epoch > 1 else last
    classes, seen = int(labels.max()) + 1, ~last.isnan()
    sums = torch.zeros(classes).index_add_(0, labels[seen], last[seen])
    by_label = (sums / torch.bincount(labels[seen], minlength=classes))[labels]
    now = epochs[epoch]
    logits = nn.functional.linear(epochs[epoch - 1]["inputs"].float(), now["weight"], now["bias"])
    head = upper_bound(logits, labels)
    return {
        "last": last,
        "mean of last two": (last + before) / 2,
        "last + label's mean": last + by_label / 4,
        "today's head": head,
        "today's head + last": (head + last) / 2,
    }


def measure(task: Task, seed: int, folder: Path) -> list[dict[str, float]]:
    """Train once; give the gains of every predictor by epoch, the first that has two before it first."""
    torch.manual_seed(seed)
    model = task.model()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    args = ImportanceTrainingArguments(
        str(folder), seed=seed, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, importance_method="history", importance_kwargs={"margin": 1e6},
        dataloader_drop_last=True, **task.arguments,
    )  # fmt: skip
    trainer = Tracing(head, model=model, args=args, train_dataset=task.train, data_collator=task.collator)
    trainer.train()
    labels = torch.as_tensor(task.train.columns["labels"])
    assert IGNORED_LABEL not in labels
    rows = []
    for epoch in range(2, len(trainer.epochs)):
        found = trainer.epochs[epoch]["scores"]
        row: dict[str, float] = {"epoch": epoch + 1}
        known = ~found.isnan()
        row["tau squared"] = float(found[known].square().mean() / found[known].mean() ** 2)
        earlier = predictors(trainer.epochs, epoch - 1, labels)
        for name, predicted in predictors(trainer.epochs, epoch, labels).items():
            target = trainer.epochs[epoch - 1]["scores"]
            pairs = ~(earlier[name].isnan() | target.isnan())
            usable = known & ~predicted.isnan()
            calibration = calibrate(earlier[name][pairs], target[pairs])
            if name == "last":
                row["last, raw"] = gain(predicted[usable], found[usable])
            row[name] = gain(calibration.levels[calibration.bins(predicted[usable]).long()], found[usable])
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["fashion", "clothing", "sst2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    settings = parser.parse_args()
    for name in settings.tasks:
        task = TASKS[name](settings.data, settings.models)
        for seed in settings.seeds:
            rows = measure(task, seed, Path("runs/memory_predictors"))
            print(f"\n{name}, seed {seed}")
            cells = ([f"{value:.3g}" for value in row.values()] for row in rows)
            print(table(list(rows[0]), cells, text=0), flush=True)


if __name__ == "__main__":
    main()
