r"""Variance reduction by score (paper, section 4.1, figures 1 and 2): the upper bound is nearly the best there is.

Claim: drawn by the upper bound, the gradient of a small batch is almost as close to the full one as drawn by the true
gradient norm, which is optimal; drawn by the loss it is further away, early in training even further than drawn
uniformly. The upper bound is "almost perfectly correlated" with the norm, the loss only where both are small.

A wide residual network trains by SGD. At points along the run 1,024 training examples are taken, and 128 of them drawn
10 times by each score, by both ways of drawing. ``distance`` is that between the weighted mean gradient of the 128 and
the mean gradient of the 1,024, averaged over the draws; ``relative`` is over that of uniform draws with replacement.
``expected`` is what ``relative`` is in theory (the root of the exact second moments' ratio, with replacement), so it
checks the 10 draws. ``squared_error`` sums the squared differences of the probabilities from those of the norm::

    python examples/paper/variance_reduction.py                               # digits, WRN-10-1, under 3 minutes
    python examples/paper/variance_reduction.py --dataset fashion_mnist --data path/to/data --steps 800 --seeds 0
    python examples/paper/variance_reduction.py --full                        # CIFAR-100, WRN-28-2, from the Hub

Measured (seeds 0, 1, 2): of the variance that the true norm takes away the upper bound takes 94 % (CIFAR-10) and 98 %
(digits) once the model fits its data, and less than half before; the loss as much in the end, less in between. Draws
without replacement are 13 % (CIFAR-10) to 78 % (digits) closer. Figures and tables: docs/paper.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import tasks
import torch
import transformers
from networks import WideResNetConfig, WideResNetForImageClassification
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_importance import estimate_tau, resample, upper_bound
from hf_importance.heads.scores import gradient_norm
from hf_importance.reporting import markdown

DRAWS = 10
COLORS = {
    "uniform": figures.BLACK,
    "loss": figures.ORANGE,
    "upper_bound": figures.BLUE,
    "gradient_norm": figures.GREEN,
}
STYLES = {"multinomial": "-", "systematic": "--"}


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        dataset: What is trained on.
        depth: Of the network.
        widen: Of the network.
        side: Of the pictures, in pixels.
        steps: Of training.
        every: Steps between two measurements; 0: after 1/64, 1/32, ... of all steps, since most happens early.
        pool: Examples that are drawn from, B.
        kept: How many are drawn, b; also the training batch.
    """

    dataset: str = "digits"
    depth: int = 10
    widen: int = 1
    side: int = 8
    steps: int = 400
    every: int = 0
    pool: int = 1024
    kept: int = 128


# 50,000 updates, a measurement every 3,000: recalled from the paper, whose text here has lost its numbers.
FULL = Size("cifar100", depth=28, widen=2, side=32, steps=50_000, every=3_000)


def new_model(size: Size, channels: int, classes: int) -> nn.Module:
    """Make the network."""
    config = WideResNetConfig(depth=size.depth, widen=size.widen, num_channels=channels, num_labels=classes)
    return WideResNetForImageClassification(config)


def gradient(model: nn.Module, pixels: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Give the weighted mean gradient over examples, flat, shape ``(parameters,)``."""
    parameters, total = [p for p in model.parameters() if p.requires_grad], 0.0
    parts = zip(pixels.split(256), labels.split(256), weights.split(256), strict=True)
    for some_pixels, some_labels, some_weights in parts:
        losses = nn.functional.cross_entropy(model(some_pixels).logits, some_labels, reduction="none")
        found = torch.autograd.grad((losses * some_weights).sum() / len(labels), parameters)
        total = total + torch.cat([part.flatten() for part in found])
    return total


def score(model: nn.Module, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Score examples in each way, each shape ``(B,)``; the true norm by a backward pass an example, as the paper."""
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in pixels.split(256)])

    def losses() -> Iterator[Tensor]:
        for i in range(len(labels)):
            yield nn.functional.cross_entropy(model(pixels[i : i + 1]).logits, labels[i : i + 1])

    return {
        "uniform": torch.ones(len(labels), device=pixels.device),
        "loss": nn.functional.cross_entropy(logits, labels, reduction="none"),
        "upper_bound": upper_bound(logits, labels),
        "gradient_norm": gradient_norm(losses(), (p for p in model.parameters() if p.requires_grad)),
    }


def measure(
    model: nn.Module, pixels: Tensor, labels: Tensor, kept: int, generator: torch.Generator
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Compare the scores at the weights that the model has.

    Args:
        model: The network.
        pixels: Of the pool, shape ``(B, ...)``.
        labels: Of the pool, shape ``(B,)``.
        kept: How many of the pool are drawn, b.
        generator: Of the draws; on the CPU.

    Returns:
        A row for each score and way of drawing, and the probabilities by score, each shape ``(B,)``.
    """
    scores = {name: values.cpu().double() for name, values in score(model, pixels, labels).items()}
    shares = {name: values / values.sum() for name, values in scores.items()}
    full = gradient(model, pixels, labels, torch.ones(len(labels), device=pixels.device))
    norms, center = scores["gradient_norm"].square(), float(full.double().norm()) ** 2

    def second_moment(name: str) -> float:
        # E|g_i w_i|² over draws by p, minus |full|²: the variance of one draw with replacement.
        return float((norms / (len(labels) ** 2 * shares[name].clamp(min=1e-300))).sum()) - center

    rows = []
    for resampling in STYLES:
        for name, values in scores.items():
            distances = []
            for _ in range(DRAWS):
                index, weights = resample(values, kept, resampling, generator)
                index, weights = index.to(pixels.device), weights.float().to(pixels.device)
                drawn = gradient(model, pixels[index], labels[index], weights)
                distances.append(float((drawn - full).norm()))
            rows.append(
                {
                    "score": name,
                    "resampling": resampling,
                    "distance": statistics.mean(distances),
                    "distance_sd": statistics.stdev(distances),
                    "expected": (second_moment(name) / second_moment("uniform")) ** 0.5,
                    "tau": float(estimate_tau(values)),
                    "correlation": correlation(shares[name], shares["gradient_norm"]),
                    "squared_error": float((shares[name] - shares["gradient_norm"]).square().sum()),
                }
            )
    for row in rows:
        row["relative"] = row["distance"] / rows[0]["distance"]
    return rows, shares


def correlation(a: Tensor, b: Tensor) -> float:
    """Give Pearson's correlation; 0 where one of the two does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0


class Probe(TrainerCallback):
    """Calls a function with the model after given steps."""

    def __init__(self, steps: set[int], function: Callable[[nn.Module, int], None]) -> None:
        self.steps, self.function = steps, function

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measure, where it is time."""
        if state.global_step in self.steps:
            self.function(model, state.global_step)


def measured_steps(size: Size) -> set[int]:
    """Say after which steps is measured."""
    if size.every:
        return set(range(size.every, size.steps + 1, size.every))
    return {max(size.steps // 2**halvings, 1) for halvings in range(7)}


def schedule(steps: int) -> Callable[[int], float]:
    """Give the paper's learning rate: divided by 5 at 40 % and at 80 % of the steps."""
    return lambda step: 0.2 ** ((step >= 0.4 * steps) + (step >= 0.8 * steps))


def run(size: Size, train: tasks.Pictures, seed: int) -> tuple[list[dict], list[dict]]:
    """Train once, uniformly, and measure on the way; give rows, and the probabilities as points."""
    transformers.set_seed(seed)
    model = new_model(size, train.pixels.shape[1], int(train.labels.max()) + 1)
    # Trainer moves the model to its device; the optimizer's parameters must be there before.
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randperm(len(train), generator=generator)[: size.pool]
    rows: list[dict] = []
    points: list[dict] = []

    def look(model: nn.Module, step: int) -> None:
        device = next(model.parameters()).device
        pixels, labels = train.pixels[pool].to(device), train.labels[pool].to(device)
        found, shares = measure(model, pixels, labels, size.kept, generator)
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(model(pixels).logits, labels))
        rows.extend({"seed": seed, "step": step, "train_loss": loss, **row} for row in found)
        names = ("gradient_norm", "upper_bound", "loss")
        columns = zip(*(shares[name].tolist() for name in names), strict=True)
        points.extend({"seed": seed, "step": step, **dict(zip(names, values, strict=True))} for values in columns)
        line = {(r["score"], r["resampling"][:1]): round(r["relative"], 3) for r in found}
        print(seed, step, f"loss {loss:.4f}", line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, seed=seed, max_steps=size.steps, per_device_train_batch_size=size.kept, max_grad_norm=0,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(size.steps))
        probe = Probe(measured_steps(size), look)
        trainer = Trainer(model, args, train_dataset=train, callbacks=[probe], optimizers=(optimizer, falling))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return rows, points


def draw(rows: list[dict], points: list[dict], made: str, folder: Path) -> None:
    """Draw figure 1 (relative distance along the run) and figure 2 (probabilities against those of the norm)."""
    figure, panels = figures.new_figure(9, 3.9, 2, sharey=True)
    steps = sorted({row["step"] for row in rows})
    for panel, resampling in zip(panels, STYLES, strict=True):
        for name, color in COLORS.items():
            found = [[r["relative"] for r in rows if (r["score"], r["resampling"], r["step"]) == (name, resampling, s)]
                     for s in steps]  # fmt: skip
            if resampling == "multinomial":
                exact = [[r["expected"] for r in rows if (r["score"], r["step"]) == (name, s)] for s in steps]
                panel.plot(steps, [statistics.mean(e) for e in exact], ":", color=color, lw=1.2)
            panel.plot(
                steps, [statistics.mean(f) for f in found], "o-", color=color, label=name.replace("_", " "), ms=4
            )
            panel.fill_between(steps, [min(f) for f in found], [max(f) for f in found], color=color, alpha=0.15, lw=0)
        panel.set(title=f"{resampling}", xlabel="steps of training", ylim=(0, None))
        if steps[-1] / steps[0] > 30:
            panel.set_xscale("log")
    panels[0].set_ylabel("distance from the full gradient,\nrelative to uniform with replacement")
    panels[0].plot([], [], ":", color="0.4", label="in theory")
    panels[0].legend(frameon=False, fontsize=9)
    figures.save(figure, folder / "variance_reduction.png", made, (row["seed"] for row in rows))

    steps = sorted({p["step"] for p in points})[-2:]
    figure, panels = figures.new_figure(9, 3.3 * len(steps) + 0.5, 2, rows=len(steps), sharex=True, sharey=True)
    places = ((step, name) for step in steps for name in ("loss", "upper_bound"))
    for panel, (step, name) in zip(panels, places, strict=True):
        x, y = ([p[column] for p in points if p["step"] == step] for column in ("gradient_norm", name))
        panel.plot(x, y, ".", color=COLORS[name], ms=3.5, alpha=0.5)
        panel.plot([min(x), max(x)], [min(x), max(x)], color="0.4", lw=1)
        row = next(r for r in rows if (r["score"], r["step"], r["seed"]) == (name, step, points[0]["seed"]))
        panel.set(xscale="log", yscale="log")
        panel.set_title(
            f"{name.replace('_', ' ')}, step {step}: correlation {row['correlation']:.2f}, "
            f"squared error {row['squared_error']:.1e}",
            fontsize=9,
        )
    for panel in panels[-2:]:
        panel.set_xlabel("probability by the true gradient norm")
    for panel in panels[::2]:
        panel.set_ylabel("probability by the score")
    figures.save(figure, folder / "score_scatter.png", made, [points[0]["seed"]])


def table(rows: list[dict]) -> str:
    """Give the means over seeds by score, for the first, the middle, and the last measurement, as Markdown."""
    names = ("relative", "expected", "correlation", "squared_error")
    lines = []
    steps = sorted({row["step"] for row in rows})
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        for resampling in STYLES:
            for name in COLORS:
                some = [r for r in rows if (r["score"], r["resampling"], r["step"]) == (name, resampling, step)]
                cells = [f"{statistics.mean(r[column] for r in some):.3g}" for column in names]
                lines.append([step, name, resampling, *cells])
    return markdown.table(["step", "score", "resampling", *names], lines, text=3)


def main() -> None:
    """Run all seeds, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="The paper's setting.")
    parser.add_argument("--dataset", help="digits, cifar10, cifar100, fashion_mnist, a Hub id, or a folder.")
    parser.add_argument("--data", default=tasks.data_folder(), help="Folder of data sets; else HF_IMPORTANCE_DATA.")
    for name in ("depth", "widen", "side", "steps", "every", "pool", "kept"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--limit", type=int, help="Training examples, at most.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="Folder of CSV files and figures.")
    given = parser.parse_args()
    base = FULL if given.full else Size()
    size = Size(**{name: base_value if getattr(given, name) is None else getattr(given, name)
                   for name, base_value in vars(base).items()})  # fmt: skip
    made = figures.provenance()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if size.dataset == "digits":
        train, _ = tasks.digits()
    else:
        side = 32 if given.side is None and not given.full else size.side
        grey = size.dataset.endswith("mnist")
        train, _ = tasks.pictures(
            size.dataset, given.data, 28 if grey and given.side is None else side, grey, given.limit
        )
    rows, points = [], []
    for seed in given.seeds:
        found = run(size, train, seed)
        rows += found[0]
        points += found[1] if seed == given.seeds[0] else []
    figures.write(given.output / "variance_reduction.csv", rows, made)
    figures.write(given.output / "score_scatter.csv", points, made)
    draw(rows, points, made, given.output)
    print(f"\n{made}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
