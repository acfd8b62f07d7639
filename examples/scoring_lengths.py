"""What scoring texts sorted by their length saves: the pool's own batch, which came as it was drawn, among them.

    python examples/scoring_lengths.py --data path/to/data --models path/to/models

Pools of texts are scored by MiniLM with the own batch as it came, behind it the others sorted by length, and with all
of them sorted; in turn, by the process's own clock. The result stands in docs/costs.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from remembered_scores import TASKS, Task

from hf_importance.batches.lengths import in_passes, lengths_on_host
from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.heads.choose import head_of
from hf_importance.objective.scorer import Scorer
from hf_importance.reporting.markdown import lines
from hf_importance.reporting.spread import mean_and_spread, standard_error

BATCH, PADDING = 32, Padding()


def pools(task: Task, size: int, count: int) -> Iterator[list]:
    """Give pools as a step scores them: the own batch first, the rest in batches of texts of alike length."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = [task.train[i] for i in torch.randperm(len(task.train), generator=generator)[:size].tolist()]
        own, rest = (dict(task.collator(part)) for part in (rows[:BATCH], rows[BATCH:]))
        yield [own, *in_passes([rest], BATCH, BATCH, PADDING)]


def measure(task: Task, size: int, count: int, dtype: str) -> tuple[list[float], list[float]]:
    """Give of each pool the tokens and the time that it takes sorted over those that it takes as it came."""
    model = task.model()
    scorer = Scorer(lambda: model, head_of(model, 0.0, None), dtype=dtype)
    tokens, seconds, seen = [], [], [0]
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
    for number, batches in enumerate(pools(task, size, count + 1)):
        took, passed = {}, {}
        for in_order in (True, False)[:: 1 - number % 2 * 2]:
            begun, start = len(seen), time.process_time()
            lengths = [lengths_on_host(batch, PADDING) for batch in batches] if in_order else [None]
            scorer(PooledBatches(batches, PADDING, lengths), BATCH)
            took[in_order], passed[in_order] = time.process_time() - start, sum(seen[begun:])
        if number:  # the first one warms up
            tokens.append(passed[True] / passed[False])
            seconds.append(took[True] / took[False])
    return tokens, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=["sst2", "clinc"], default=["sst2", "clinc"])
    parser.add_argument("--sizes", nargs="+", type=float, default=[2, 3.5], help="Of a pool, in batches.")
    parser.add_argument("--pools", type=int, default=10)
    parser.add_argument("--dtype", default="bf16")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    def rows() -> Iterator[list[str]]:
        for name in settings.tasks:
            task = TASKS[name](settings.data, settings.models)
            for size in settings.sizes:
                found = measure(task, round(size * BATCH), settings.pools, settings.dtype)
                yield [name, f"{size:g}", *(mean_and_spread(ratios, standard_error) for ratios in found)]

    for line in lines(["task", "pool, in batches", "tokens, sorted over as it came", "time"], rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
