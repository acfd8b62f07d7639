"""A method as a user writes it: the one of docs/write_a_sampler.md."""

from dataclasses import dataclass

import torch

from hf_importance import Pool, Sampler


@dataclass
class TopK(Sampler):
    """Trains on the examples of a pool with the largest loss, once the first have been learnt. Biased."""

    ratio: int = 3
    score = "loss"

    @dataclass
    class State:
        first: float = 0.0  # mean loss of the first step
        on: bool = False

    def pool(self):
        size = self.run.batch_size
        return Pool(self.ratio * size, size) if self.state.on else None

    def keep(self, pool):
        rows = pool.scores.topk(pool.kept).indices
        return rows, torch.ones(len(rows))

    def measure(self, seen):
        return [float(seen.scores.sum()), float(len(seen.scores))]

    def learn(self, tau, sums):
        mean = sums[0] / sums[1]
        self.state.first = self.state.first or mean
        self.state.on = self.state.on or mean < 0.9 * self.state.first
