r"""Does a planned step have the noise that the cost rule says? The true gradient's, beside that of a uniform step.

A task of ``remembered_scores.py`` is trained uniformly. After every epoch the true gradient of some hundred training
examples is taken, one backward pass each, dropout off and BatchNorm with running statistics; a gradient is kept as
its projection on 4,096 random directions (a count sketch), which leaves distances as they are. Then steps with
``importance_budget="constant_variance"`` are played on these examples as training does them: plan by what earlier
steps showed, draw a pool, score, keep, learn from the scores. ``noise`` is the mean squared distance of their
gradients from the mean gradient, over that of uniform steps (1 is what is promised); ``cost`` what the plan says::

    python examples/gradient_noise.py --data path/to/data --models path/to/models --tasks clothing --kappa 0.24

Results stand in docs/costs.md.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from remembered_scores import TASKS, Task
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_importance import estimate_tau, resample, upper_bound
from hf_importance.costs import plan
from hf_importance.variance import VarianceFactor, WithoutReplacement, WithReplacement, inverse_moments

DIRECTIONS = 4096
STEPS = 1000  # played of each kind
MOMENTUM = 0.9  # tau_momentum's default
# How it is drawn, and the safety margin.
KINDS = {
    "with replacement": ("multinomial", 1.0),
    "without": ("systematic", 1.0),
    "without, margin 1.1": ("systematic", 1.1),
}


def gradients(model: nn.Module, task: Task, index: list[int]) -> tuple[Tensor, Tensor]:
    """Give the projected gradient of each example, shape ``(m, DIRECTIONS)``, and its score, shape ``(m,)``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    numbers = sum(p.numel() for p in parameters)
    direction = torch.randint(DIRECTIONS, (numbers,), generator=generator)
    sign = torch.randint(0, 2, (numbers,), generator=generator).float() * 2 - 1
    found, scores = torch.empty(len(index), DIRECTIONS, dtype=torch.float64), torch.empty(len(index))
    for row, example in enumerate(index):
        batch = task.collator([task.train[example]])
        outputs = model(**batch)
        scores[row] = upper_bound(outputs.logits.detach(), batch["labels"])[0]
        parts = torch.autograd.grad(outputs.loss, parameters, allow_unused=True)
        whole = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, parts, strict=True)
            ]
        )
        found[row] = torch.zeros(DIRECTIONS).index_add_(0, direction, whole * sign)
    return found, scores.double()


def uniform_steps(found: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
    """Give the gradient of uniform steps of ``size``, and what each costs."""
    for _ in range(STEPS):
        yield found[torch.randperm(len(found), generator=generator)[:size]].mean(0), 1.0


def planned_steps(
    found: Tensor, scores: Tensor, size: int, kappa: float, kind: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Give the gradient of planned steps, and what each costs."""
    resampling, margin = KINDS[kind]
    tau, factor = 1.0, WithoutReplacement(MOMENTUM)
    for step in range(-50, STEPS):
        pool = torch.randperm(len(found), generator=generator)[:size]
        if step >= 0:  # before, uniform steps show what there is to win
            known: VarianceFactor = factor if resampling == "systematic" else WithReplacement(tau)
            planned = plan("constant_variance", size, known, kappa, None, margin, max(size // 4, 1), len(found))
            pool = torch.randperm(len(found), generator=generator)[: planned.pool]
            index, weights = resample(scores[pool], planned.kept, resampling, generator)
            yield (found[pool[index]] * weights[:, None]).mean(0), planned.cost
        tau = MOMENTUM * tau + (1 - MOMENTUM) * float(estimate_tau(scores[pool]))
        factor.average(inverse_moments(scores[pool]).tolist())


def noise(steps: Iterator[tuple[Tensor, float]], center: Tensor) -> tuple[float, float, float]:
    """Give the mean squared distance from the center, its standard error, and the mean cost."""
    pairs = [(float((gradient - center).square().sum()), cost) for gradient, cost in steps]
    distances, costs = torch.tensor(pairs, dtype=torch.float64).T
    return float(distances.mean()), float(distances.std()) / math.sqrt(len(distances)), float(costs.mean())


class Probe(TrainerCallback):
    """Calls a function after every epoch, with the model in ``eval()``."""

    def __init__(self, function: Callable[[nn.Module, int], None]) -> None:
        self.function = function

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measure."""
        model.eval()
        self.function(model, round(state.epoch))
        model.train()


def main() -> None:
    """Train each task once and print a row an epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["clothing", "sst2"])
    parser.add_argument("--kappa", type=float, default=1 / 3)
    parser.add_argument("--examples", type=int, default=600)
    settings = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in settings.tasks:
        task = TASKS[name](settings.data, settings.models)
        size = task.arguments["per_device_train_batch_size"]
        generator = torch.Generator().manual_seed(0)
        index = torch.randperm(len(task.train), generator=generator)[: settings.examples].tolist()
        print(f"\n{name}, kappa {settings.kappa}, batch {size}, {settings.examples} examples")
        print("| epoch | tau | " + " | ".join(f"{kind}: cost | noise" for kind in KINDS) + " |")
        print("|--:|--:|" + "--:|--:|" * len(KINDS), flush=True)

        def measure(model: nn.Module, epoch: int, task=task, size=size, index=index) -> None:
            generator = torch.Generator().manual_seed(1)
            found, scores = gradients(model, task, index)
            center = found.mean(0)
            uniform, uniform_error, _ = noise(uniform_steps(found, size, generator), center)
            cells = [f"{epoch}", f"{float(estimate_tau(scores)):.2f}"]
            for kind in KINDS:
                steps = planned_steps(found, scores, size, settings.kappa, kind, generator)
                drawn, error, cost = noise(steps, center)
                spread = drawn / uniform * math.hypot(error / drawn, uniform_error / uniform)
                cells += [f"{cost:.2f}", f"{drawn / uniform:.2f} ± {spread:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)

        torch.manual_seed(0)
        arguments = TrainingArguments(
            tempfile.mkdtemp(), seed=0, save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, **task.arguments,
        )  # fmt: skip
        trainer = Trainer(
            task.model(), arguments, train_dataset=task.train, data_collator=task.collator, callbacks=[Probe(measure)]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
