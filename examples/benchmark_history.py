"""What remembering costs at ten million examples: memory, the draws of an epoch, the upkeep of the table.

Prints each beside a training pass of a small model over the same number of examples, measured in the same run on a
part of it. Results stand in docs/history.md::

    python examples/benchmark_history.py --examples 10000000
"""

import argparse
import resource
import statistics
import time

import torch
from accelerate import Accelerator
from torch import nn

from hf_importance.ranks import Ranks
from hf_importance.run.table import Table
from hf_importance.samplers.history import History
from hf_importance.samplers.proposal import Proposal


def seconds(action, repeats: int) -> list[float]:
    """Time an action."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return found


def peak() -> float:
    """Give the largest resident size so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--draws", type=int, default=4, help="An epoch's visits are split into so many.")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    count, batch = settings.examples, settings.batch_size
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    random = torch.Generator().manual_seed(0)

    def train() -> None:
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    train()
    before = peak()
    table, proposal = Table(count, Ranks(Accelerator(cpu=True))), Proposal(History.share)
    visits = [torch.randint(count, (batch,), generator=random) for _ in range(50)]
    found, ones = torch.rand(batch, generator=random).double().exp(), torch.ones(batch).double()

    def record() -> None:
        for step, index in enumerate(visits):
            table.add(index, found, ones, step)
        table.exchange()

    # Filled without training, a chunk at a time; then once more for pairs to calibrate by.
    for _ in range(2):
        for start in range(0, count, 1 << 18):
            index = torch.arange(start, min(start + (1 << 18), count))
            scores = torch.randn(len(index), generator=random).exp().double()
            table.add(index, scores, torch.ones_like(scores), 0)
            table.exchange()

    def draw() -> None:
        proposal.refit(table.scores, table.pairs)
        proposal.draw(table.scores, count // settings.draws // batch * batch, random)

    timed = {"train": [], "record": [], "draw": []}
    for _ in range(settings.repeats):
        timed["train"] += seconds(train, 1)
        timed["record"] += seconds(record, 1)
        timed["draw"] += seconds(draw, 1)
    grown = peak() - before
    a_step, upkeep = (statistics.median(timed[name]) / 50 for name in ("train", "record"))
    epoch = a_step * count / batch
    draws = statistics.median(timed["draw"]) * settings.draws
    print(
        f"{count:,} examples, batches of {batch}, {settings.draws} draws an epoch, {torch.get_num_threads()} threads"
    )
    print(
        f"training over all of them once   {epoch:8.1f} s   ({sum(p.numel() for p in model.parameters())} parameters)"
    )
    print(f"all draws of an epoch            {draws:8.2f} s   {draws / epoch:.2%}   {timed['draw']}")
    print(f"keeping the table                {upkeep * count / batch:8.2f} s   {upkeep / a_step:.2%}")
    print(f"memory, largest                  {grown:8.0f} MB")


if __name__ == "__main__":
    main()
