r"""Does a planned step have the noise that the cost rule says? The true gradient's, beside that of a uniform step.

A task of ``remembered_scores.py`` is trained uniformly. After every epoch steps with
``importance_budget="constant_variance"`` are played on some hundred training examples as training does them: plan by
what earlier steps showed, draw a pool, keep by its scores (dropout off, running statistics), learn from them.
``noise`` is the mean squared distance of their gradients from the mean gradient, over that of uniform steps (1 is what
is promised); ``cost`` what the plan says. A gradient is kept as its projection on 4,096 random directions (a count
sketch), which leaves distances as they are. It is taken in two modes::

    eval     of each example once, one backward pass each, dropout off and BatchNorm with running statistics; a step is
             the weighted mean of its examples, and any number of steps can be played
    train    of each step by a backward pass of its own, as training has it before clipping: dropout on, BatchNorm
             normalises with the moments of what was drawn, of which there are at least 16. So what these do to a
             small batch of hard examples is in the noise

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

from hf_importance import estimate_tau, resample
from hf_importance.heads.choose import head_of
from hf_importance.objective.batch_norm import FEWEST_FOR_BATCH_NORM, batch_norm_layers
from hf_importance.theory.costs import plan
from hf_importance.theory.variance import VarianceFactor, WithoutReplacement, WithReplacement, inverse_moments

DIRECTIONS = 4096
STEPS = {"eval": 1000, "train": 200}  # played of each kind
MOMENTUM = 0.9  # the average of tau's default
# How it is drawn, and the safety margin.
KINDS = {
    "with replacement": ("multinomial", 1.0),
    "without": ("systematic", 1.0),
    "without, margin 1.1": ("systematic", 1.1),
}


Draw = tuple[Tensor, Tensor, float]  # which examples a step trains on, their weights, and what it costs


class Gradients:
    """Gradients of a model on a task's examples, projected.

    Args:
        model: Of one moment of training; left as it is, its mode too.
        task: Its examples.
        index: Which of them.

    Attributes:
        scores: Of the examples, float64, shape ``(m,)``.
    """

    def __init__(self, model: nn.Module, task: Task, index: list[int]) -> None:
        self.model, self.task, self.index = model, task, index
        self.head = head_of(model, 0.0, None)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        numbers = sum(p.numel() for p in self.parameters)
        self.direction = torch.randint(DIRECTIONS, (numbers,), generator=generator)
        self.sign = torch.randint(0, 2, (numbers,), generator=generator).float() * 2 - 1
        model.eval()
        with torch.no_grad():
            self.scores = torch.cat([self.score(example) for example in index]).double()

    def score(self, example: int) -> Tensor:
        """Score one example."""
        batch = self.task.collator([self.task.train[example]])
        return self.head.upper_bound(self.model(**self.head.model_inputs(batch)), batch)

    def of(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Give the gradient of the weighted mean loss, in the model's mode; shape ``(DIRECTIONS,)``."""
        batch = self.task.collator([self.task.train[self.index[row]] for row in rows.tolist()])
        losses = self.head.losses(self.model(**self.head.model_inputs(batch)), batch)
        loss = (weights * losses).sum() / self.head.items(batch)
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, parts, strict=True)
        whole = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        return torch.zeros(DIRECTIONS).index_add_(0, self.direction, whole * self.sign).double()

    def one_by_one(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Take the gradient of each example alone in ``eval()``; give what makes a step's of them."""
        self.model.eval()
        found = torch.stack([self.of(torch.tensor([row]), torch.ones(1)) for row in range(len(self.index))])
        return lambda rows, weights: (found[rows] * weights[:, None]).mean(0)


def uniform_steps(examples: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Draw]:
    """Give what uniform steps of ``size`` train on."""
    for _ in range(steps):
        yield torch.randperm(examples, generator=generator)[:size], torch.ones(size), 1.0


def planned_steps(
    scores: Tensor, size: int, kappa: float, kind: str, smallest: int, steps: int, generator: torch.Generator
) -> Iterator[Draw]:
    """Give what planned steps train on."""
    resampling, margin = KINDS[kind]
    tau, factor = 1.0, WithoutReplacement(MOMENTUM)
    for step in range(-50, steps):
        pool = torch.randperm(len(scores), generator=generator)[:size]
        if step >= 0:  # before, uniform steps show what there is to win
            known: VarianceFactor = factor if resampling == "systematic" else WithReplacement(tau)
            planned = plan(
                "constant_variance", size, known, kappa, margin=margin, unit=max(size // 4, 1), largest=len(scores),
                smallest=smallest,
            )  # fmt: skip
            pool = torch.randperm(len(scores), generator=generator)[: planned.pool]
            index, weights = resample(scores[pool], planned.kept, resampling, generator)
            yield pool[index], weights, planned.cost
        tau = MOMENTUM * tau + (1 - MOMENTUM) * float(estimate_tau(scores[pool]))
        factor.average(inverse_moments(scores[pool]).tolist())


def noise(
    draws: Iterator[Draw], gradient: Callable[[Tensor, Tensor], Tensor], center: Tensor
) -> tuple[float, float, float]:
    """Give the mean squared distance from the center, its standard error, and the mean cost."""
    pairs = [(float((gradient(rows, weights) - center).square().sum()), cost) for rows, weights, cost in draws]
    distances, costs = torch.tensor(pairs, dtype=torch.float64).T
    return float(distances.mean()), float(distances.std()) / math.sqrt(len(distances)), float(costs.mean())


def measure(model: nn.Module, task: Task, index: list[int], size: int, kappa: float, mode: str) -> list[str]:
    """Give τ, and of every kind cost and noise, as the cells of a row."""
    generator, steps, count = torch.Generator().manual_seed(1), STEPS[mode], len(index)
    gradients = Gradients(model, task, index)
    every = torch.arange(count), torch.ones(count)
    if mode == "eval":
        gradient, smallest = gradients.one_by_one(), 1
        center = gradient(*every)
    else:
        gradient, smallest = gradients.of, FEWEST_FOR_BATCH_NORM if batch_norm_layers(model) else 1
        model.train()
        # What a uniform step's is on average, by other steps than those that are measured.
        own = uniform_steps(count, size, steps, generator)
        center = torch.stack([gradient(rows, weights) for rows, weights, _ in own]).mean(0)
    uniform, uniform_error, _ = noise(uniform_steps(count, size, steps, generator), gradient, center)
    cells = [f"{float(estimate_tau(gradients.scores)):.2f}"]
    for kind in KINDS:
        draws = planned_steps(gradients.scores, size, kappa, kind, smallest, steps, generator)
        drawn, error, cost = noise(draws, gradient, center)
        spread = drawn / uniform * math.hypot(error / drawn, uniform_error / uniform)
        cells += [f"{cost:.2f}", f"{drawn / uniform:.2f} ± {spread:.2f}"]
    return cells


class Probe(TrainerCallback):
    """Calls a function after every epoch, and leaves no trace: of buffers, random streams and the model's mode."""

    def __init__(self, function: Callable[[nn.Module, int], None]) -> None:
        self.function = function

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measure."""
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with torch.random.fork_rng():
            self.function(model, round(state.epoch))
        for buffer, before in buffers:
            buffer.copy_(before)
        model.train()


def main() -> None:
    """Train each task once and print a row an epoch and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["clothing", "sst2"])
    parser.add_argument("--modes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--kappa", type=float, default=1 / 3)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--epochs", type=float, help="In place of each task's own.")
    settings = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in settings.tasks:
        task = TASKS[name](settings.data, settings.models)
        if settings.epochs is not None:
            task.arguments["num_train_epochs"] = settings.epochs
        size = task.arguments["per_device_train_batch_size"]
        generator = torch.Generator().manual_seed(0)
        index = torch.randperm(len(task.train), generator=generator)[: settings.examples].tolist()
        print(f"\n{name}, kappa {settings.kappa}, batch {size}, {settings.examples} examples")
        print("| epoch | mode | tau | " + " | ".join(f"{kind}: cost | noise" for kind in KINDS) + " |")
        print("|--:|---|--:|" + "--:|--:|" * len(KINDS), flush=True)

        def rows(model: nn.Module, epoch: int, task=task, size=size, index=index) -> None:
            for mode in settings.modes:
                cells = [f"{epoch}", mode, *measure(model, task, index, size, settings.kappa, mode)]
                print("| " + " | ".join(cells) + " |", flush=True)

        torch.manual_seed(0)
        arguments = TrainingArguments(
            tempfile.mkdtemp(), seed=0, save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, **task.arguments,
        )  # fmt: skip
        trainer = Trainer(
            task.model(), arguments, train_dataset=task.train, data_collator=task.collator, callbacks=[Probe(rows)]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
