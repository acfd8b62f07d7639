"""The loss of every training example, by a forward pass over the whole training set: online batch selection's."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from hf_importance.batches import Pool, batch_size_of, key_to_seed
from hf_importance.history import Pass
from hf_importance.pooling import PoolingMixin
from hf_importance.visits import pass_batches, without_index


class RescoringMixin(PoolingMixin):
    """Scores the training set anew, each rank its share of it."""

    def _gather_rows(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _score_all(self) -> tuple[Tensor, Tensor]:
        """Give the indices of all examples and their scores, on the CPU; the same on every rank, and all must call it.

        Where they do not divide by the number of ranks a few are scored twice, so that all ranks take as many forward
        passes.
        """
        started = time.perf_counter()
        loader, size = self._train_loader, self.importance_args.scoring_batch_size or self._train_batch_size
        examples, ranks, rank = len(loader.dataset), self._ranks, self.args.process_index
        share = -(-examples // ranks)
        everything = (torch.arange(share * ranks) % examples).int()
        whole = Pass(everything, torch.ones(len(everything)), float(size), -(-share // size), 0)
        # Keyed apart from the draws, so that random augmentation is not the next visit's.
        seed = key_to_seed(self._data_seed, self.state.global_step, 7)
        rows = []
        for batch in pass_batches(loader, whole, seed, rank, ranks):
            inputs, index = without_index(self._prepare_inputs(batch))
            assert index is not None and batch_size_of(inputs) == len(index)
            found = self._score_pool(Pool([inputs], self._padding()))
            rows.append(torch.stack([index.double().cpu(), found.double().cpu()], 1))
        index, found = self._gather_rows(torch.cat(rows)).T.contiguous()
        self._report.scored(share, time.perf_counter() - started)
        return index.long(), found
