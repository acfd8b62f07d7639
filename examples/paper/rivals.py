"""Later rivals of the paper's method, re-implemented from their papers to compare with: not the authors' code.

Each is a ``Trainer`` for classifiers (inputs with ``labels``, outputs with ``logits``) on one process, without
gradient accumulation. None is a part of ``hf_importance``: their gradients are biased, or
unbiased only over a whole epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer


def example_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Give the cross-entropy of each example, shape ``(b,)``, by a forward pass in the mode that the model is in."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**given).logits, inputs["labels"], reduction="none")


def scored(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Give the same without a graph and without dropout; the model is in training mode behind it."""
    model.eval()
    with torch.no_grad():
        found = example_losses(model, inputs)
    model.train()
    return found


def percentiles(losses: Tensor, window: Tensor) -> Tensor:
    """Give the share of ``window`` that is at most each loss, shape ``(b,)``, in [0, 1]."""
    return torch.searchsorted(window.sort().values, losses, right=True) / len(window)


class SelectiveBackpropTrainer(Trainer):
    """Selective backprop: trains on an example with the probability (percentile of its loss)^β.

    Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers, 2019, https://arxiv.org/abs/1910.00762.
    Every example passes a forward pass; its loss's percentile among the last ``window`` losses, its own batch
    included, to the power β, is the probability to be queued; whenever b are queued they are trained on, with equal
    weights. So the gradient is biased towards the examples with large losses, on purpose.

    Left out: reusing losses of earlier epochs instead of the forward pass ("stale" selective backprop), and skipping
    the second forward pass of the queued examples. An epoch is one pass over the candidates and has fewer steps than
    the dataset has batches, so ``max_steps`` may not be reached within the epochs that Trainer derives from it; and
    Trainer stops at an epoch that queues less than a batch.

    Args:
        *args: As ``Trainer`` takes them.
        beta: β, above 0: 1 trains on half of the examples, 2 on a third. 2 is recalled, not checked.
        window: How many losses are remembered.
        **kwargs: As ``Trainer`` takes them.
    """

    def __init__(self, *args: Any, beta: float = 2.0, window: int = 1024, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta, self.window = beta, window
        self.generator = torch.Generator().manual_seed(self.args.seed)
        self.history = torch.zeros(0)
        self.queue: dict[str, Tensor] = {}

    def select(self, losses: Tensor) -> Tensor:
        """Remember losses, shape ``(b,)``, and give the indices of those that are to be trained on."""
        losses = losses.float().cpu()
        self.history = torch.cat([self.history, losses])[-self.window :]
        chances = percentiles(losses, self.history) ** self.beta
        return (torch.rand(len(losses), generator=self.generator) < chances).nonzero()[:, 0]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Take candidates until b are queued, and give these as the batch of the step."""
        size = self.args.train_batch_size
        while not self.queue or len(self.queue["labels"]) < size:
            try:
                batch = self._prepare_inputs(next(epoch_iterator))
            except StopIteration:
                return [], None  # the queue waits for the next epoch
            kept = self.select(scored(self.model, batch)).to(device)
            rows = {name: value[kept] for name, value in batch.items()}
            self.queue = {n: torch.cat([self.queue[n], rows[n]]) for n in rows} if self.queue else rows
        batch = {name: value[:size] for name, value in self.queue.items()}
        self.queue = {name: value[size:] for name, value in self.queue.items()}
        return super().get_batch_samples(iter([batch]), 1, device)


class TopLossTrainer(Trainer):
    """RHO-loss's selection without its holdout model: of B examples the b with the largest loss are trained on.

    Mindermann et al., Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt, 2022,
    https://arxiv.org/abs/2206.07137. The gradient is biased: equal weights, hard examples only.

    Left out: the irreducible loss of each example under a model trained on holdout data, which RHO-loss subtracts from
    the loss before it ranks. Without it this is the paper's own baseline "train loss", which chases wrong labels.

    Args:
        *args: As ``Trainer`` takes them.
        ratio: B / b, an integer above 1.
        **kwargs: As ``Trainer`` takes them.
    """

    def __init__(self, *args: Any, ratio: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ratio = ratio

    def get_train_dataloader(self) -> DataLoader:
        """Give batches of B, so that an epoch has a step for each of them."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.ratio * self.args.train_batch_size,
            shuffle=True,
            drop_last=len(self.train_dataset) >= self.ratio * self.args.train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on the b examples with the largest loss."""
        inputs = self._prepare_inputs(inputs)
        losses = scored(model, inputs)
        kept = losses.topk(min(self.args.train_batch_size, len(losses))).indices
        return super().training_step(model, {name: value[kept] for name, value in inputs.items()}, *args, **kwargs)


class Indexed(Dataset):
    """A dataset whose examples say which they are, by an entry ``index``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give one example."""
        return {**self.dataset[index], "index": torch.tensor(index)}


class PrunedOrder(Sampler):
    """Which examples an epoch of InfoBatch visits, in random order, and how much each of them weighs.

    Args:
        size: Number of examples, N.
        prune: r, the share that is left out of those whose last loss is below the mean.
        annealing: Share of the run from which nothing is left out any more.
        progress: Gives the share of the run that is done.
        seed: Of the draws.

    Attributes:
        losses: Last loss of each example, shape ``(N,)``.
        weights: Weight of each example in this epoch, shape ``(N,)``.
    """

    def __init__(self, size: int, prune: float, annealing: float, progress: Callable[[], float], seed: int) -> None:
        self.prune, self.annealing, self.progress, self.seed = prune, annealing, progress, seed
        self.losses, self.weights = torch.zeros(size), torch.ones(size)
        self.epoch: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose what an epoch visits; the same epoch again changes nothing."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        kept = torch.ones(len(self.losses), dtype=torch.bool)
        self.weights = torch.ones(len(self.losses))
        if epoch > 0 and self.progress() < self.annealing:
            learned = (self.losses < self.losses.mean()).nonzero()[:, 0]
            shuffled = learned[torch.randperm(len(learned), generator=generator)]
            stay = shuffled[: int((1 - self.prune) * len(learned))]
            kept[learned] = False
            kept[stay] = True
            self.weights[stay] = 1 / (1 - self.prune)
        found = kept.nonzero()[:, 0]
        self.order = found[torch.randperm(len(found), generator=generator)].tolist()

    def __len__(self) -> int:
        """Give the number of examples of this epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Give their indices."""
        return iter(self.order)


class InfoBatchTrainer(Trainer):
    """InfoBatch: leaves out a random half of the well-learned examples each epoch, and weighs the others up.

    Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning, 2024,
    https://arxiv.org/abs/2303.04947. An example is well-learned if its last loss, of whatever epoch, is below the mean
    of all; each of these is left out with probability r, and those that stay count 1 / (1 - r). In the last part of
    the run, from the share δ on, all are trained on as they are. Losses come from training, at no cost.

    Left out: nothing of the method; the learning-rate schedule of its experiments (OneCycle) is the user's here. Its
    epochs are shorter than the dataset, so ``max_steps`` may not be reached within those that Trainer derives from it.

    Args:
        *args: As ``Trainer`` takes them.
        prune: r, in [0, 1); the paper's 0.5.
        annealing: δ, in [0, 1]; the paper's 0.875.
        progress: Gives the share of the run that is done; by default that of its steps.
        **kwargs: As ``Trainer`` takes them.
    """

    def __init__(
        self,
        *args: Any,
        prune: float = 0.5,
        annealing: float = 0.875,
        progress: Callable[[], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        progress = progress or (lambda: self.state.global_step / max(self.state.max_steps, 1))
        self.sampler = PrunedOrder(len(self.train_dataset), prune, annealing, progress, self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        """Give the batches of what an epoch visits; each says which examples it holds."""
        loader = DataLoader(
            Indexed(self.train_dataset),
            batch_size=self.args.train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Give the weighted mean loss, and remember the loss of each example."""
        if "index" not in inputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        index = inputs["index"].cpu()
        losses = example_losses(model, {name: value for name, value in inputs.items() if name != "index"})
        self.sampler.losses[index] = losses.detach().float().cpu()
        return (losses * self.sampler.weights[index].to(losses.device)).mean()
