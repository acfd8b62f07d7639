"""The last score of each training example, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_importance.checkpoint.schema import COUNT
from hf_importance.ranks import Ranks

COLUMNS = ("scores", "seen", "visits", "weight_sum")
# Pairs that a calibration is estimated from, at most; 2 MB. More would not sharpen 32 bins.
PAIRS = 1 << 18
# Steps whose visits enter the table together: a step's own would cost more in calls than in work.
STEPS_AT_ONCE = 32


@dataclass
class TableState:
    """What goes into a checkpoint beside the tensors."""

    paired: Annotated[int, COUNT] = 0  # pairs recorded since the start
    waiting: Annotated[int, COUNT] = 0  # steps whose rows are not in the table yet


class Table:
    """Scores, and the pairs (remembered, found) of recent visits.

    Args:
        examples: Training examples, ``N``.
        ranks: Between which rows are exchanged.

    Attributes:
        scores: Last score of each example, NaN while it was never seen; float32, shape ``(N,)``.
        seen: Optimizer step of its last visit; int32, shape ``(N,)``.
        visits: In how many batches it was trained on; int32, shape ``(N,)``.
        weight_sum: Sum of the importance weights that it had; float32, shape ``(N,)``.
    """

    def __init__(self, examples: int, ranks: Ranks) -> None:
        self.scores = torch.full((examples,), torch.nan)
        self.seen = torch.zeros(examples, dtype=torch.int32)
        self.visits = torch.zeros(examples, dtype=torch.int32)
        self.weight_sum = torch.zeros(examples)
        self.state = TableState()
        self._ranks = ranks
        # A ring: row k % len(ring) holds the k-th pair.
        self._ring = torch.full((min(PAIRS, max(examples, 1024)), 2), torch.nan)
        self._rows: list[Tensor] = []  # visits not yet in the table: index, score, step, weight

    @property
    def pairs(self) -> Tensor:
        """Scores remembered and found at the next visit, of the latest visits in any order; shape ``(m, 2)``."""
        return self._ring[: self.state.paired]

    def add(self, index: Tensor, found: Tensor, weights: Tensor, step: int) -> None:
        """Keep what this rank found in one step; it enters the table when all ranks exchange.

        Args:
            index: Examples, in the order of their visits, int64, shape ``(m,)``.
            found: Their scores, float64, shape ``(m,)``; a non-finite one is not remembered.
            weights: Importance weight of each visit, 1 where it was drawn uniformly, 0 where an example was only
                scored; float64, shape ``(m,)``.
            step: Optimizer step.
        """
        self._rows.append(torch.stack([index.double(), found, torch.full_like(found, step), weights], 1))
        self.state.waiting += 1
        # On several ranks at the decisions only, where all exchange.
        if self._ranks.size == 1 and self.state.waiting >= STEPS_AT_ONCE:
            self.exchange()

    def exchange(self) -> None:
        """Bring the visits of all ranks into the table, in the order of their steps. All ranks must call it."""
        index, found, step, weights = self._waiting_rows().T.contiguous()
        self._rows, self.state.waiting = [], 0
        self._record(index.long(), found.float(), step.int(), weights.float())

    def _waiting_rows(self) -> Tensor:
        rows = torch.cat([torch.empty((0, 4), dtype=torch.float64), *self._rows])
        if self._ranks.size == 1:
            return rows
        rows = self._ranks.gather(rows)
        return rows[rows[:, 2].argsort(stable=True)]

    def _record(self, index: Tensor, found: Tensor, step: Tensor, weights: Tensor) -> None:
        # Of an example visited twice NumPy adds both, and keeps the last score; torch promises neither.
        np.add.at(self.visits.numpy(), index.numpy(), (weights > 0).numpy().astype(np.int32))
        np.add.at(self.weight_sum.numpy(), index.numpy(), weights.numpy())
        finite = found.isfinite()
        index, found, step = index[finite], found[finite], step[finite]
        remembered = self.scores[index]
        known = ~remembered.isnan()
        pairs = torch.stack([remembered[known], found[known]], 1)[-len(self._ring) :]
        rows = (self.state.paired + torch.arange(len(pairs))) % len(self._ring)
        self._ring[rows] = pairs
        self.state.paired += len(pairs)
        self.replace(index, found, step)

    def replace(self, index: Tensor, found: Tensor, step: Tensor | int) -> None:
        """Overwrite scores; the last of an example counts."""
        self.scores.numpy()[index.numpy()] = found.numpy()
        self.seen.numpy()[index.numpy()] = step.numpy() if isinstance(step, Tensor) else step

    def log_entries(self, step: int) -> dict[str, float]:
        """Give how old the scores are on average, in steps, and of what share of the examples there is one."""
        seen = ~self.scores.isnan()
        visited = int(seen.sum())
        age = float((step - self.seen[seen].double()).mean()) if visited else 0.0
        return {"table_age": age, "table_share": visited / len(self.scores)}

    def as_dataset(self, step: int) -> datasets.Dataset:
        """Give the table as a dataset: see ``ImportanceMixin.importance_table``."""
        columns = {
            "index": np.arange(len(self.scores)),
            "score": self.scores.numpy(),
            "age": step - self.seen.numpy(),
            "visits": self.visits.numpy(),
            "weight_sum": self.weight_sum.numpy(),
        }
        return datasets.Dataset.from_dict(columns)

    # ---- State ----

    def tensors(self) -> dict[str, Tensor]:
        """Give what a resumed run needs, without changing anything: saving must not. All ranks must call it."""
        return {name: getattr(self, name) for name in COLUMNS} | {"pairs": self._ring, "rows": self._waiting_rows()}

    def load(self, state: TableState, tensors: dict[str, Tensor], file: str) -> None:
        """Take up what :attr:`state` and :meth:`tensors` were.

        Raises:
            ValueError: A tensor is missing, of another shape, or holds what no run writes; ``file`` is named.
        """
        expected = {**{name: getattr(self, name) for name in COLUMNS}, "pairs": self._ring}
        for name, current in expected.items():
            found = tensors.get(name)
            if found is None or found.shape != current.shape or found.dtype != current.dtype:
                said = "is missing" if found is None else f"is {tuple(found.shape)} of {found.dtype}"
                raise ValueError(
                    f"{file}: {name} {said}, but this run's is {tuple(current.shape)} of {current.dtype}."
                )
        rows = tensors.get("rows")
        if rows is None or rows.dim() != 2 or rows.shape[1] != 4 or rows.dtype != torch.float64:
            raise ValueError(f"{file}: rows, the visits of the last steps, is missing or has not four columns.")
        index, _, _, weights = rows.T
        pairs, weight_sum = tensors["pairs"][: state.paired], tensors["weight_sum"]
        negative = [part < 0 for part in (*(tensors[name] for name in COLUMNS), pairs, weights)]
        # NaN is the score of an example never seen, and in the rows one that is not remembered.
        endless = [tensors["scores"].isinf(), *(~part.isfinite() for part in (pairs, weights, weight_sum))]
        unknown = ~((index >= 0) & (index < len(self.scores)))
        if any(bool(wrong.any()) for wrong in (*negative, *endless, unknown)):
            raise ValueError(
                f"{file} holds scores or weights that are negative or not finite, or examples that train_dataset has "
                "not: it is damaged, or compute_score_func gave such scores. Resume from an older checkpoint."
            )
        for name in COLUMNS:
            setattr(self, name, tensors[name])
        self._ring, self.state = tensors["pairs"], state
        # What the ranks had not exchanged is one list now: the first takes it.
        self._rows = [rows] if self._ranks.rank == 0 else []
