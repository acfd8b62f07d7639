r"""Mindermann et al., Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt, 2022.

https://arxiv.org/abs/2206.07137. Of a pool of ``B`` examples the ``b`` with the largest *reducible* loss are trained
on, that is the loss minus the irreducible one, which the example has under a model trained on other data:
:math:`\ell_i(\theta) - \ell_i(\theta_\text{holdout})`. Equal weights: biased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_importance.heads.choose import head_of
from hf_importance.objective.scorer import evaluation_mode
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored
from hf_importance.values import check_range


def irreducible_losses(reference: Trainer, dataset: Any) -> Tensor:
    """Give the loss of each example under a model that was trained without it. All ranks must call it.

    Args:
        reference: The trainer of that model, trained already.
        dataset: The training set that :class:`RhoLoss` will select from, map-style.

    Returns:
        Shape ``(N,)``, float32, on the CPU, in the order of the dataset.

    Raises:
        ValueError: The loss of the model is not known to split by example.
    """
    model, accelerator = reference.model, reference.accelerator
    head = head_of(accelerator.unwrap_model(model), 0.0, reference.compute_loss_func)
    if head is None:
        raise ValueError(
            f"The loss of {type(model).__name__} is not known to split by example, so pass RhoLoss the losses "
            "themselves: a tensor with one for each training example."
        )
    found = []
    with evaluation_mode(model), torch.no_grad():
        for batch in reference.get_eval_dataloader(dataset):
            losses = head.losses(model(**head.model_inputs(batch)), batch)
            found.append(accelerator.gather_for_metrics(losses.float()).cpu())
    return torch.cat(found)


@dataclass(eq=False)
class RhoLoss(Sampler):
    """Trains on the examples of a pool with the largest reducible loss.

    What differs: pools are the Trainer's batch and a reserve, so an example may stand in several pools of an epoch;
    the irreducible losses are computed once, by :func:`irreducible_losses`.

    Attributes:
        irreducible: Irreducible loss of each training example, shape ``(N,)``; zeros make it the publication's own
            baseline "train loss", which chases wrong labels.
        ratio: B / b, above 1; 10, 32 of 320, is recalled from the publication, not checked.
    """

    irreducible: Tensor
    ratio: float = 10.0

    score = "loss"
    remembers = True  # so that pools know which examples they hold

    def __post_init__(self) -> None:
        """Check every value."""
        check_range("ratio", self.ratio, 1, math.inf, "It must exceed 1.", open_low=True)
        found = self.irreducible
        if not (isinstance(found, Tensor) and found.dim() == 1 and bool(found.isfinite().all())):
            raise ValueError("irreducible must be a tensor with one finite loss for each training example.")

    def begin(self, run: Facts) -> None:
        """Refuse losses of another dataset."""
        super().begin(run)
        if len(self.irreducible) != run.examples:
            raise ValueError(
                f"irreducible has {len(self.irreducible)} losses, and train_dataset {run.examples} examples. Compute "
                "them with irreducible_losses(reference, train_dataset)."
            )

    def pool(self) -> Pool:
        """Score ``ratio`` batches."""
        return Pool(math.ceil(self.ratio * self.run.batch_size), self.run.batch_size)

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Keep those with the largest reducible loss."""
        reducible = pool.scores - self.irreducible.cpu()[pool.index]
        rows = reducible.topk(min(pool.kept, len(reducible))).indices
        return rows, torch.ones(len(rows))
