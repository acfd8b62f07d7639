"""Steers the history method: when passes begin, how long they are, when it goes on and off.

Decisions fall at a few points of an epoch, from figures that all ranks share, so that all decide the same:

- while no pass runs, ten times an epoch: the table is brought up to date, calibrated anew, and the gain to be expected
  is known
- where a pass ends: the next one is drawn. Nobody reads the Trainer's own loader while passes run, so it can be read
  again only where an epoch begins; where memory stops paying before, the passes until then are uniform ones
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_importance.costs import HYSTERESIS
from hf_importance.history import SMALLEST_FRACTION, History
from hf_importance.sampling import bias_weights
from hf_importance.training_args import ImportanceArguments
from hf_importance.visits import pass_batches

DECISIONS_PER_EPOCH = 10
# Steps whose visits enter the table together: a step's own would cost more in calls than in work.
STEPS_AT_ONCE = 32
# Examples that the gain must stand on before it is believed.
FEWEST_EXAMPLES = 200


class Remembering:
    """The history method of one training run.

    Args:
        settings: The arguments of importance sampling.
        loader: The Trainer's own loader; its dataset carries indices.
        accumulation: Micro-batches of an optimizer step.
        rank: Index of this process.
        ranks: Number of processes.
        seed: What all draws are keyed by.
        gather: Concatenates rows, shape ``(m, 4)``, over ranks; the identity on one.
    """

    def __init__(
        self,
        settings: ImportanceArguments,
        loader: DataLoader,
        accumulation: int,
        rank: int,
        ranks: int,
        seed: int,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        self.settings, self.loader = settings, loader
        self.accumulation, self.rank, self.ranks, self.seed = accumulation, rank, ranks, seed
        self._gather = gather
        self.fewest = 1  # examples of a micro-batch, at least
        self.history = History(len(loader.dataset), seed, settings.uniform_share)
        self.micro_batches = len(loader)
        self.updates = math.ceil(self.micro_batches / accumulation)
        # Of all ranks together; a loader that accelerate did not make has its own.
        total: int | None = getattr(loader, "total_batch_size", None)
        self.batch_size: int = (loader.batch_size or 1) if total is None else total // ranks
        self._epoch: Any = None
        self._position = 0  # optimizer steps of this epoch
        self._batches: Iterator[dict[str, Any]] | None = None
        self._rows: list[Tensor] = []  # visits not yet in the table: index, score, step, weight
        # Examples and weights of the micro-batches handed out in this step.
        self.handed: list[tuple[Tensor, Tensor]] = []
        self.undoing = torch.empty(0)  # see Pass.undoing, of the same examples

    def resume(self, state: dict[str, Any], tensors: dict[str, Tensor], as_saved: bool) -> None:
        """Take up a checkpoint's history.

        Args:
            state: What ``History.state_dict`` gave.
            tensors: What ``History.tensors`` gave.
            as_saved: Whether the settings are those that it was saved with. Else the pass in progress is given up,
                since its micro-batches were made for other ranks or sizes; the table stays.

        Raises:
            ValueError: The table is of a dataset of another length.
        """
        saved, current = len(tensors["scores"]), self.history.examples
        if saved != current:
            raise ValueError(
                f"The checkpoint remembers scores of {saved} examples, and train_dataset has {current}: they would be "
                "credited to the wrong ones. Resume with the dataset that the run began with, or with "
                "importance_method='presample'."
            )
        self.history.load(state, tensors)
        if not as_saved:
            self.history.current = None

    # ---- Where the run stands ----

    def begin_step(self, epoch_iterator: Any, position: int) -> None:
        """Follow the Trainer's epochs: a new iterator is a new epoch.

        Args:
            epoch_iterator: What the Trainer reads its batches from.
            position: Optimizer steps of the epoch before this one, where it is new.
        """
        if epoch_iterator is not self._epoch:
            self._epoch, self._position = epoch_iterator, position
        else:
            self._position += 1

    @property
    def at_decision(self) -> bool:
        """Whether a pass has ended, or while none runs whether a tenth of an epoch has."""
        if self.history.current is not None:
            return self.history.current.position >= self.history.current.length
        return self._position % max(self.updates // DECISIONS_PER_EPOCH, 1) == 0

    @property
    def active(self) -> bool:
        """Whether a pass runs."""
        return self.history.current is not None

    @property
    def drawn(self) -> bool:
        """Whether a pass runs that was drawn by the table, not uniformly."""
        return self.history.current is not None and not self.history.current.uniform

    @property
    def price(self) -> float:
        """What the noise of a uniform step costs by remembered scores, relative to it; infinite while unknown."""
        history = self.history
        known = history.calibration is not None and history.averages.count >= FEWEST_EXAMPLES
        return self.settings.variance_margin / history.averages.gain if known else math.inf

    def decide(self, otherwise: float = 1.0) -> bool:
        """Bring the table up to date and give whether the next steps are drawn by it. All ranks must call it.

        Args:
            otherwise: What the noise of a uniform step costs in the steps that come else: 1 if they are uniform.
        """
        was_drawn = self.drawn
        within = self.active and self._position > 0  # an epoch whose own batches nobody has read
        self.history.current, self._batches = None, None
        self.exchange()
        self.history.refit()
        if self.price * (1 if was_drawn else HYSTERESIS) < (1.0 if within else otherwise):
            self._begin_pass(self.history.averages.gain)
        elif within:
            self._begin_uniform_pass()
        return self.drawn

    def _begin_pass(self, gain: float) -> None:
        """Draw a pass with batches as large as the budget asks for."""
        fraction = 1.0
        if self.settings.importance_budget == "constant_variance":
            smallest = max(SMALLEST_FRACTION, self.fewest / self.batch_size)
            fraction = min(max(self.settings.variance_margin / gain, smallest), 1.0)
        left = max(self.updates - self._position, 1)
        # A pass over all examples would be uniform.
        passes = max(self.history.passes_for(fraction), 2 if fraction == 1 else 1)
        self._begin(fraction, math.ceil(left / max(round(left / self.updates * passes), 1)), uniform=False)

    def _begin_uniform_pass(self) -> None:
        """Draw a tenth of an epoch, or what is left of it, uniformly."""
        left = max(self.updates - self._position, 1)
        self._begin(1.0, min(max(self.updates // DECISIONS_PER_EPOCH, 1), left), uniform=True)

    def _begin(self, fraction: float, updates: int, uniform: bool) -> None:
        length = min(updates * self.accumulation, max(self.micro_batches - self._position * self.accumulation, 1))
        # Where the last batch is short, or padded to be even over ranks, there are more places than examples.
        largest = self.history.examples / (length * self.ranks)
        self.history.begin_pass(min(self.batch_size * fraction, largest), length, self.ranks, uniform)
        self._bias_weights()

    def _bias_weights(self) -> None:
        """Raise the weights of a pass to ``weight_exponent``, a micro-batch of all ranks at a time."""
        current, exponent = self.history.current, self.settings.weight_exponent
        if current is None or exponent == 1:
            return
        current.inverse = current.weights
        starts = [current.rows(m, 0, 1).start * self.ranks for m in range(current.length + 1)]
        together = current.inverse.split([end - start for start, end in pairwise(starts)])
        current.weights = torch.cat([bias_weights(weights, exponent) for weights in together])

    # ---- Batches ----

    def take(self, count: int) -> list[dict[str, Any]]:
        """Give the micro-batches of one optimizer step, drawn by the table."""
        current = self.history.current
        assert current is not None
        if self._batches is None:
            self._batches = pass_batches(self.loader, current, self.seed, self.rank, self.ranks)
        count = min(count, current.length - current.position)
        found = [next(self._batches) for _ in range(count)]
        slices = [current.rows(current.position + m, self.rank, self.ranks) for m in range(count)]
        self.handed = [(current.index[rows], current.weights[rows]) for rows in slices]
        self.undoing = torch.cat([current.undoing[rows] for rows in slices])
        current.position += count
        return found

    def end_batches(self) -> None:
        """End the workers that load the pass in progress."""
        self._batches = None

    @property
    def items_an_example(self) -> float:
        """Mean number of items of the loss that an example has, over all uniform steps."""
        averages = self.history.averages
        return averages.items / averages.examples

    # ---- What visits found ----

    def record(self, index: Tensor, found: Tensor, weights: Tensor, step: int) -> None:
        """Keep what this rank found in one step for the table; each argument float64 or an index, shape ``(m,)``."""
        self._rows.append(torch.stack([index.double(), found, torch.full_like(found, step), weights], 1))
        # On several ranks at the decisions only, where all exchange.
        if self.ranks == 1 and len(self._rows) >= STEPS_AT_ONCE:
            self.exchange()

    def exchange(self) -> None:
        """Bring the visits of all ranks into the table, in the order of their steps. All ranks must call it."""
        rows = torch.cat([torch.empty((0, 4), dtype=torch.float64), *self._rows])
        self._rows = []
        if self.ranks > 1:
            rows = self._gather(rows)
            rows = rows[rows[:, 2].argsort(stable=True)]
        index, found, step, weights = rows.T.contiguous()
        self.history.record(index.long(), found.float(), step.int(), weights.float())

    def measure(self, count: float, uniform_moment: float, drawn_moment: float, items: float, examples: float) -> None:
        """Average in one optimizer step's sums over all ranks."""
        averages = self.history.averages
        averages.items += items
        averages.examples += examples
        if self.history.calibration is not None:
            # Over the examples of a quarter of an epoch, however many steps these are.
            step = self.batch_size * self.accumulation * self.ranks
            window = max(self.updates / 4, 20, 2 * FEWEST_EXAMPLES / step)
            averages.add(count, uniform_moment, drawn_moment, (1 - 1 / window) ** (count / step))

    def log_entries(self, step: int) -> dict[str, float]:
        """Give the log entries of the method."""
        seen = ~self.history.scores.isnan()
        visited = int(seen.sum())
        age = float((step - self.history.seen[seen].double()).mean()) if visited else 0.0
        return {
            "gain": self.history.averages.gain,
            "table_age": age,
            "table_share": visited / self.history.examples,
            "skipped_share": self.history.skipped_share,
        }

    def table(self, step: int) -> datasets.Dataset:
        """Give the table as a dataset: see ``ImportanceTrainer.importance_table``."""
        history = self.history
        columns = {
            "index": np.arange(history.examples),
            "score": history.scores.numpy(),
            "age": step - history.seen.numpy(),
            "visits": history.visits.numpy(),
            "weight_sum": history.weight_sum.numpy(),
        }
        return datasets.Dataset.from_dict(columns)
