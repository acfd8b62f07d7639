r"""Does a planned step have the noise that the cost rule says? The true gradient's, beside that of a uniform step.

A task of ``remembered_scores.py``, or of ``frontier``, is trained uniformly. After every epoch steps with
``importance_budget="constant_variance"`` are played on some hundred training examples as training does them: plan by
what earlier steps showed, draw a pool, keep by its scores (dropout off, running statistics), learn from them.
``noise`` is the variance of their gradients over that of uniform steps' (1 is what is promised); ``cost`` what the
plan says. A gradient is kept as its projection on 4,096 random directions (a count sketch), which leaves distances as
they are. It is taken in two modes::

    eval     of each example once, one backward pass each, dropout off and BatchNorm with running statistics; a step is
             the weighted mean of its examples, and any number of steps can be played
    train    of each step by a backward pass of its own, as training has it before clipping: dropout on, BatchNorm
             normalises with the moments of what was drawn, of which there are at least 16. So what these do to a
             small batch of hard examples is in the noise

With ``--history`` the run is by ``importance_method="history"`` with ``"constant_variance"``; a row an epoch says::

    batch    of its steps drawn by memory, over a uniform step's
    scores   noise of these steps, as trained on, over that of uniform ones: mean w² Ĝ² / n over mean w Ĝ² / b
    gain     gone by halfway through a draw; of today's scores of all examples; and of gradients' true norms
    mean     share that the mean gradient has of the second moment, which is no noise
    noise    of steps as that draw could have had them, by their gradients in ``train()``, over uniform steps'

With ``--perceptrons`` the models are small ones with dropout, on points made for it, for which no data is needed.

"calibrated" is what ``Presample`` does: it draws by what the scores of pools were found to say of those in training.

    python examples/gradient_noise.py --data path/to/data --models path/to/models --tasks clothing --kappa 0.24

Results stand in docs/costs.md.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from remembered_scores import TASKS, Task
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_importance import History, ImportanceTrainer, ImportanceTrainingArguments, estimate_tau, resample
from hf_importance.heads.choose import head_of
from hf_importance.objective.batch_norm import FEWEST_FOR_BATCH_NORM, batch_norm_layers
from hf_importance.reporting.markdown import line, lines
from hf_importance.samplers.sampler import Facts, Visits
from hf_importance.theory.calibration import InTraining, pair_sums
from hf_importance.theory.costs import plan
from hf_importance.theory.sampling import inclusion_probabilities
from hf_importance.theory.variance import VarianceFactor, WithoutReplacement, WithReplacement, inverse_moments

sys.path.append(str(Path(__file__).parent / "frontier"))
import learners

DIRECTIONS = 4096
STEPS = {"eval": 1000, "train": 200}  # played of each kind
MOMENTUM = 0.9  # the average of tau's default
# How it is drawn, the safety margin, and whether scores are calibrated.
KINDS = {
    "with replacement": ("multinomial", 1.0, False),
    "without": ("systematic", 1.0, False),
    "without, margin 1.1": ("systematic", 1.1, False),
    "calibrated": ("systematic", 1.0, True),
    "calibrated, margin 1.1": ("systematic", 1.1, True),
}


def of_the_bench(name: str, data: Path, models: Path) -> Task:
    """Give a task of ``frontier``."""
    task = learners.TASKS[name]
    parts = task.load(data, models)
    arguments = {
        "per_device_train_batch_size": task.batch_size,
        "num_train_epochs": task.epochs,
        "learning_rate": task.rates[1],
        "remove_unused_columns": False,
        "max_grad_norm": 1.0,
    }
    if task.sgd:
        arguments |= {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0}
    return Task(
        lambda: task.model(parts), parts.train, parts.test, lambda: parts.validation, arguments, parts.train.collate
    )


TASKS |= {name: functools.partial(of_the_bench, name) for name in learners.TASKS if name not in TASKS}
Draw = tuple[Tensor, Tensor, float]  # which examples a step trains on, their weights, and what it costs


class Gradients:
    """Gradients of a model on a task's examples, projected.

    Args:
        model: Of one moment of training; left as it is, its mode too.
        task: Its examples.
        index: Which of them.

    """

    def __init__(self, model: nn.Module, task: Task, index: list[int]) -> None:
        self.model, self.task, self.index = model, task, index
        self.head = head_of(model, 0.0, None)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        numbers = sum(p.numel() for p in self.parameters)
        self.direction = torch.randint(DIRECTIONS, (numbers,), generator=generator)
        self.sign = torch.randint(0, 2, (numbers,), generator=generator).float() * 2 - 1

    @functools.cached_property
    def scores(self) -> Tensor:
        """Score all in ``eval()``, which stays on."""
        self.model.eval()
        return torch.cat([self.heard(rows) for rows in torch.arange(len(self.index)).split(64)])

    def of(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Give the gradient of the weighted mean loss, in the model's mode; shape ``(DIRECTIONS,)``."""
        batch = self.task.collator([self.task.train[self.index[row]] for row in rows.tolist()])
        losses = self.head.losses(self.model(**self.head.model_inputs(batch)), batch)
        loss = (weights * losses).sum() / self.head.items(batch)
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, parts, strict=True)
        whole = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        return torch.zeros(DIRECTIONS).index_add_(0, self.direction, whole * self.sign).double()

    def heard(self, rows: Tensor) -> Tensor:
        """Score examples in the model's mode, as training passes do; shape ``(m,)``."""
        batch = self.task.collator([self.task.train[self.index[row]] for row in rows.tolist()])
        with torch.no_grad():
            return self.head.upper_bound(self.model(**self.head.model_inputs(batch)), batch).double()

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
    gradients: Gradients, size: int, kappa: float, kind: str, smallest: int, steps: int, generator: torch.Generator
) -> Iterator[Draw]:
    """Give what planned steps train on."""
    resampling, margin, calibrates = KINDS[kind]
    scores, in_training = gradients.scores, InTraining()
    tau, factor = 1.0, WithoutReplacement(MOMENTUM)
    for step in range(-50, steps):
        pool = kept = torch.randperm(len(scores), generator=generator)[:size]
        if step >= 0:  # before, uniform steps show what there is to win
            known: VarianceFactor = factor if resampling == "systematic" else WithReplacement(tau)
            planned = plan(
                "constant_variance", size, known, kappa, margin=margin, unit=max(size // 4, 1), largest=len(scores),
                smallest=smallest,
            )  # fmt: skip
            pool = torch.randperm(len(scores), generator=generator)[: planned.pool]
            index, weights = resample(in_training(scores[pool]), round(planned.kept), resampling, generator)
            kept = pool[index]
            yield kept, weights, planned.cost
        if calibrates:
            in_training.average(pair_sums(scores[kept], gradients.heard(kept)))
        tau = MOMENTUM * tau + (1 - MOMENTUM) * float(estimate_tau(scores[pool]))
        factor.average(inverse_moments(in_training(scores[pool])).tolist())


def noise(draws: Iterator[Draw], gradient: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float, float]:
    """Give the variance of the steps' gradients, its standard error, and the mean cost."""
    pairs = [(gradient(rows, weights), cost) for rows, weights, cost in draws]
    found, count = torch.stack([one for one, _ in pairs]), len(pairs)
    distances = (found - found.mean(0)).square().sum(1) * count / (count - 1)
    costs = math.fsum(cost for _, cost in pairs)
    return float(distances.mean()), float(distances.std()) / math.sqrt(count), costs / count


def over(drawn: tuple[float, float, float], uniform: tuple[float, float, float]) -> str:
    """Give the noise of drawn steps over that of uniform ones, and its standard error, as a cell."""
    ratio = drawn[0] / uniform[0]
    return f"{ratio:.2f} ± {ratio * math.hypot(drawn[1] / drawn[0], uniform[1] / uniform[0]):.2f}"


def measure(
    model: nn.Module, task: Task, index: list[int], size: int, kappa: float, mode: str, kinds: list[str]
) -> list[str]:
    """Give τ, and of every kind cost and noise, as the cells of a row."""
    generator, steps, count = torch.Generator().manual_seed(1), STEPS[mode], len(index)
    gradients = Gradients(model, task, index)
    tau = float(estimate_tau(gradients.scores))
    if mode == "eval":
        gradient, smallest = gradients.one_by_one(), 1
    else:
        gradient, smallest = gradients.of, FEWEST_FOR_BATCH_NORM if batch_norm_layers(model) else 1
        model.train()
    uniform = noise(uniform_steps(count, size, steps, generator), gradient)
    cells = [f"{tau:.2f}"]
    for kind in kinds:
        drawn = noise(planned_steps(gradients, size, kappa, kind, smallest, steps, generator), gradient)
        cells += [f"{drawn[2]:.2f}", over(drawn, uniform)]
    return cells


class Watched(History):
    """Notes what its steps found, and what it drew by."""

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins."""
        super().begin(run)
        self.steps: list[tuple[float, float, float]] = []  # batch, noise, a uniform step's noise
        self.halfway = -1

    def visits(self) -> Visits | None:
        """Draw, and note by what and until when."""
        found = super().visits()
        if found is not None and not found.uniform:
            run, self.then = self.run, copy.copy(self)
            table, place = copy.copy(run.table), run.place()
            table.scores = table.scores.clone()
            self.then.state, self.then.proposal = copy.copy(self.state), copy.copy(self.proposal)
            self.then.run = dataclasses.replace(run, table=table, place=lambda: place)
            self.drawn = found
            self.halfway = run.step() + max(found.micro_batches // run.accumulation // 2, 1)
        return found

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Note the second moments of a step."""
        super().learn(tau, sums)
        size = self.run.batch_size * self.run.accumulation
        if self.state.drawn:
            count, uniform, drawn = sums
            self.steps.append((count / size, drawn / count**2, uniform / count / size))

    def again(self, steps: int, generator: torch.Generator) -> Iterator[Draw]:
        """Give steps that the last draw could have had as well."""
        then, drawn = copy.copy(self.then), self.drawn
        then.run = dataclasses.replace(then.run, generator=lambda *key: generator)
        size, given = then.run.batch_size, 0
        while given < steps:
            visits = then.draw(drawn.batch_size / size, drawn.micro_batches // then.run.accumulation)
            ends = [math.floor(micro * visits.batch_size) for micro in range(visits.micro_batches + 1)]
            for start, end in itertools.islice(itertools.pairwise(ends), steps - given):
                given += 1
                yield visits.index[start:end].long(), visits.weights[start:end], (end - start) / size

    def weights_then(self, index: Tensor) -> Tensor:
        """Give the weights that any examples would have had in the last draw, float64."""
        then, size = self.then.proposal, len(self.drawn.index)
        inclusion = inclusion_probabilities(then.relative, size, then.counts)
        bins = then.calibration.bins(self.then.run.table.scores[index]).long()
        return size / len(self.then.run.table.scores) / inclusion[bins]


def measure_history(model: nn.Module, task: Task, sampler: Watched, size: int, settings: argparse.Namespace) -> list:
    """Give the gains, the mean gradient's part and the noise of a draw's steps, as cells."""
    examples, steps, count = len(task.train), STEPS["train"], settings.examples
    generator, gradients = torch.Generator().manual_seed(1), Gradients(model, task, list(range(examples)))
    model.train()
    rows = torch.randperm(examples, generator=generator)
    weights = sampler.weights_then(rows)
    squares = torch.cat([gradients.heard(part) for part in rows.split(250)]).square()
    found = torch.stack([gradients.of(row, torch.ones(1)) for row in rows[:count].split(1)])
    norms = found.square().sum(1)
    mean = float(found.sum(0).square().sum() - norms.sum()) / (count - 1) / float(norms.sum())
    of_scores, of_norms = (float(x.mean() / (w * x).mean()) for x, w in ((squares, weights), (norms, weights[:count])))
    drawn = noise(sampler.again(steps, generator), gradients.of)
    uniform = noise(uniform_steps(examples, size, steps, generator), gradients.of)
    return [f"{sampler.gain:.2f}", f"{of_scores:.2f}", f"{of_norms:.2f}", f"{mean:.3f}", over(drawn, uniform)]


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


class Halfway(Probe):
    """Calls it halfway through a draw by memory in place of that, once in the second half of each epoch."""

    def __init__(
        self, function: Callable[[nn.Module, int], None], sampler: Watched, say: Callable[[int], None]
    ) -> None:
        super().__init__(function)
        self.sampler, self.say, self.measured = sampler, say, 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure."""
        if state.global_step == self.sampler.halfway and state.epoch % 1 >= 0.4 and self.measured < state.epoch:
            super().on_epoch_end(args, state, control, **kwargs)
            self.measured = math.ceil(state.epoch)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Print the epoch's row."""
        self.say(round(state.epoch))


class Perceptron(nn.Module):
    """64 hidden units, with dropout before both layers."""

    loss_type = "ForSequenceClassification"

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head, self.dropout = nn.Linear(20, 64), nn.Linear(64, 4), nn.Dropout(dropout)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Give the loss where there are labels, and the logits."""
        logits = self.head(self.dropout(F.relu(self.hidden(self.dropout(x)))))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def print_head(*names: str, kinds: Sequence[str] = (), text: int = 0) -> None:
    """Print the head of a table, with two columns for each kind."""
    pairs = [f"{kind}: {what}" if what == "cost" else what for kind in kinds for what in ("cost", "noise")]
    print(*lines([*names, *pairs], text=text), sep="\n", flush=True)


def perceptrons(kinds: list[str], kappa: float) -> None:
    """Train perceptrons on 2,000 points of four classes, one in twenty with a random label; print a row each."""
    generator = torch.Generator().manual_seed(3)
    centers, labels = torch.randn(4, 20, generator=generator) * 1.5, torch.randint(0, 4, (2000,), generator=generator)
    points = centers[labels] + torch.randn(2000, 20, generator=generator)
    noisy = torch.rand(2000, generator=generator) < 0.05
    labels = torch.where(noisy, torch.randint(0, 4, (2000,), generator=generator), labels)
    rows = [{"x": points[i], "labels": labels[i]} for i in range(2000)]
    task = SimpleNamespace(train=rows, collator=default_collate)
    print_head("dropout", "steps", "tau", kinds=kinds)
    for dropout, steps in itertools.product((0.0, 0.1, 0.3), (150, 600)):
        model = Perceptron(dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            drawn = torch.randint(0, 2000, (32,))
            optimizer.zero_grad()
            model(points[drawn], labels[drawn])["loss"].backward()
            optimizer.step()
        cells = measure(model, task, list(range(2000)), 32, kappa, "train", kinds)
        print(line([dropout, steps, *cells]), flush=True)


def by_history(task: Task, size: int, settings: argparse.Namespace) -> None:
    """Train a task by history and print a row an epoch."""
    print_head("epoch", "batch", "scores", "gain", "of scores", "of norms", "mean", "noise")
    sampler, cells = Watched(budget="constant_variance", margin=settings.margin), []

    def measured(model: nn.Module, epoch: int) -> None:
        cells[:] = measure_history(model, task, sampler, size, settings)

    def row(epoch: int) -> None:
        if sampler.steps:
            batch, drawn, uniform = torch.tensor(sampler.steps, dtype=torch.float64).mean(0).tolist()
            print(line([epoch, f"{batch:.2f}", f"{drawn / uniform:.2f}", *cells]), flush=True)
        sampler.steps, cells[:] = [], []

    torch.manual_seed(settings.seed)
    arguments = arguments_of(ImportanceTrainingArguments, task, settings.seed)
    trainer = ImportanceTrainer(
        task.model(), arguments, train_dataset=task.train, data_collator=task.collator, sampler=sampler,
        callbacks=[Halfway(measured, sampler, row)],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def arguments_of(kind: type[TrainingArguments], task: Task, seed: int) -> TrainingArguments:
    """Give a task's arguments, for a run that says and writes nothing."""
    quiet = {"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    return kind(tempfile.mkdtemp(), seed=seed, dataloader_pin_memory=False, **quiet, **task.arguments)


def main() -> None:
    """Train each task once and print a row an epoch and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["clothing", "sst2"])
    parser.add_argument("--modes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--perceptrons", action="store_true", help="In place of tasks: small ones, with dropout.")
    parser.add_argument("--history", action="store_true", help="Of runs by history, in place of uniform ones.")
    parser.add_argument("--margin", type=float, default=1.0, help="Of history.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, help="Played of each kind, in place of 1,000 and 200.")
    parser.add_argument("--kappa", type=float, default=1 / 3)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, help="In place of each task's own.")
    settings = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if settings.steps is not None:
        STEPS.update(dict.fromkeys(STEPS, settings.steps))
    if settings.perceptrons:
        perceptrons(settings.kinds, settings.kappa)
        return
    for name in settings.tasks:
        task = TASKS[name](settings.data, settings.models)
        if settings.epochs is not None:
            task.arguments["num_train_epochs"] = settings.epochs
        size = task.arguments["per_device_train_batch_size"]
        generator = torch.Generator().manual_seed(0)
        index = torch.randperm(len(task.train), generator=generator)[: settings.examples].tolist()
        print(f"\n{name}, kappa {settings.kappa}, batch {size}, {settings.examples} examples")
        if settings.history:
            by_history(task, size, settings)
            continue
        print_head("epoch", "mode", "tau", kinds=settings.kinds, text=2)

        def rows(model: nn.Module, epoch: int, task=task, size=size, index=index) -> None:
            for mode in settings.modes:
                cells = [epoch, mode, *measure(model, task, index, size, settings.kappa, mode, settings.kinds)]
                print(line(cells), flush=True)

        torch.manual_seed(settings.seed)
        arguments = arguments_of(TrainingArguments, task, settings.seed)
        trainer = Trainer(
            task.model(), arguments, train_dataset=task.train, data_collator=task.collator, callbacks=[Probe(rows)]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
