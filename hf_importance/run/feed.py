"""Where the batches of a run come from: the Trainer's own, visits that a sampler has named, the reserve of a pool."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hf_importance.batches.lengths import in_passes
from hf_importance.batches.pool import Padding
from hf_importance.batches.reserve import Population, Reserve, ReserveDataset, reserve_sizes, reserve_unit
from hf_importance.batches.streams import Lockstep, Stream
from hf_importance.batches.visits import Order, visit_batches
from hf_importance.checkpoint.schema import COUNT, integer, number, optional
from hf_importance.ranks import Ranks
from hf_importance.samplers.sampler import Pool, Visits

DECISIONS_PER_EPOCH = 10


@dataclass(frozen=True)
class StreamPlace:
    """How far a stream was read."""

    passes: Annotated[int, COUNT] = 0  # how often it was started over
    drawn: Annotated[int, COUNT] = 0  # batches of this time


@dataclass(frozen=True)
class OrderState:
    """The visits in progress, beside their tensors."""

    batch_size: Annotated[float, number(1, 2**31)]
    length: Annotated[int, integer(1)]
    number: Annotated[int, COUNT]
    uniform: bool
    kept: Annotated[int | None, optional(integer(1))] = None  # where they are scored, see Visits


@dataclass(frozen=True)
class FeedState:
    """Where reading goes on; what a checkpoint holds is the place before the step in progress."""

    reserve: Annotated[int, COUNT] = 0  # batches handed out
    parts: Annotated[int, integer(1)] = 1  # of them in a row that have distinct examples
    draws: Annotated[int, COUNT] = 0  # visits begun
    visited: Annotated[int, COUNT] = 0  # micro-batches of the visits in progress handed out
    visits: OrderState | None = None
    stream: StreamPlace = field(default_factory=StreamPlace)


@dataclass
class Handed:
    """What visits gave one step, of each micro-batch: the batch, its examples, their weights, what each represents.

    Before these ``left_out`` micro-batches hold nothing.
    """

    batches: list[Any]
    index: Tensor
    weights: list[Tensor]
    represents: Tensor
    left_out: int


class Feed:
    """Reads batches, and knows its place.

    Args:
        loader: The Trainer's own loader.
        ranks: This process among others.
        padding: How rows of different batches are brought together.
        seed: What all draws are keyed by.
        batch_size: Of a micro-batch on each rank.
        accumulation: Micro-batches of an optimizer step.
        updates: Optimizer steps of an epoch; 0 for a stream.
        scoring_batch_size: Texts are sorted by length into batches of so many.
        skipped: Gives how many optimizer steps of an epoch that begins now were done before.
        population: What the loader draws from; None for a stream.

    Attributes:
        state: Where reading stood before the step in progress.
        place: Optimizer steps of this epoch before this one.
        gathered: As in ``Facts``.
    """

    def __init__(
        self,
        loader: DataLoader,
        ranks: Ranks,
        padding: Padding,
        seed: int,
        batch_size: int,
        accumulation: int,
        updates: int,
        scoring_batch_size: int | None,
        skipped: Callable[[], int],
        population: Population | None,
    ) -> None:
        self.loader, self.padding, self.population = loader, padding, population
        self.streaming = isinstance(loader.dataset, IterableDataset)
        self.state = FeedState()
        self.place, self.gathered, self._visited = 0, 1, 0
        self._ranks, self._seed, self._batch_size = ranks, seed, batch_size
        self._accumulation, self._updates, self._skipped = accumulation, updates, skipped
        self._scoring_batch_size = scoring_batch_size or batch_size
        self._lockstep = Lockstep(loader, ranks.gather_number) if ranks.size > 1 else None
        self._stream: Stream | None = None
        self._epoch: Any = None
        self._reserve: Reserve | None = None
        self._order: Order | None = None
        self._represents: Tensor | None = None  # where it is not the weights
        self._visits: Iterator[Any] | None = None

    # ---- The Trainer's own batches ----

    def follow(self, epoch_iterator: Iterator[Any], count: int) -> Iterator[Any]:
        """Follow the Trainer's epochs: a new iterator is a new epoch. Give what this step's batches are read from.

        It ends where it ends on another rank in this epoch.
        """
        if epoch_iterator is self._epoch:
            self.place += 1
        else:
            self._epoch, self.place = epoch_iterator, self._skipped()
        iterator = epoch_iterator if self._stream is None else self._stream.follow(epoch_iterator)
        return iterator if self._lockstep is None else self._lockstep.take(iterator, count, epoch_iterator)

    def read_on(self, epoch: int, skipped: int, place: StreamPlace) -> None:
        """Read a stream on from where a checkpoint left it, and the Trainer has skipped batches."""
        self._stream = Stream(self.loader, epoch, skipped, place.passes, place.drawn)
        self.state = replace(self.state, stream=place)

    # ---- Visits ----

    @property
    def decision_due(self) -> bool:
        """Whether visits have ended, or while none run whether a tenth of an epoch has."""
        if self._order is not None:
            return self._visited >= self._order.length
        return self.place % max(self._updates // DECISIONS_PER_EPOCH, 1) == 0

    @property
    def visiting(self) -> bool:
        """Whether the steps are visits."""
        return self._order is not None

    @property
    def visiting_uniformly(self) -> bool:
        """Whether they are uniform ones."""
        return self.state.visits is not None and self.state.visits.uniform

    def visit(self, visits: Visits | None) -> None:
        """Begin these visits, or none; it falls between two steps."""
        self.end_visits()
        if visits is None:
            return
        size = visits.batch_size
        if size is None:
            size = len(visits.index) / (visits.micro_batches * self._ranks.size)
            if math.floor(visits.micro_batches * size) < len(visits.index) // self._ranks.size:
                size = math.nextafter(size, math.inf)  # rounding would lose the last example
        named = {"index": visits.index.int(), "weights": visits.weights.float()}
        if visits.represents is not None:
            named["represents"] = visits.represents.float()
        self._begin(named, OrderState(size, visits.micro_batches, self.state.draws, visits.uniform, visits.kept))
        self.state = replace(self.state, draws=self.state.draws + 1)

    def _begin(self, named: dict[str, Tensor], state: OrderState, visited: int = 0) -> None:
        together = self.gathered if state.kept is None else 1  # what is scored is gathered behind it
        how = state.batch_size, state.length, state.number, together, self._batch_size
        self._order = Order(named["index"], named["weights"], *how)
        self._represents, self._visited = named.get("represents"), visited
        self.state = replace(self.state, visits=state, visited=visited)

    def end_visits(self) -> None:
        """Give up the visits in progress."""
        self._order, self._represents, self._visits, self._visited = None, None, None, 0
        self.state = replace(self.state, visits=None, visited=0)

    def uniform_visits(self, examples: int, micro_batches: int, generator: torch.Generator) -> Visits:
        """Give visits to the end of an epoch whose own batches nobody has read."""
        places = min(micro_batches * self._batch_size * self._ranks.size, examples)
        index = torch.randperm(examples, generator=generator)[:places]
        return Visits(index, torch.ones(places), micro_batches, uniform=True)

    def hand_out(self, count: int) -> Handed:
        """Give the micro-batches of one optimizer step of visits."""
        order, rank, ranks = self._order, self._ranks.rank, self._ranks.size
        assert order is not None
        if self._visits is None:
            self._visits = visit_batches(self.loader, order, self._visited, self._seed, rank, ranks)
        begun, until = self._visited, min(self._visited + count, order.length)
        micro = [one for one in range(begun, until) if not order.left_out(one)]
        batches = [next(self._visits) for _ in micro]
        rows = [order.rows(one, rank, ranks) for one in micro]
        represents = order.weights if self._represents is None else self._represents
        self._visited = until
        return Handed(
            batches,
            torch.cat([order.index[part] for part in rows]).long(),
            [order.weights[part] for part in rows],
            torch.cat([represents[part] for part in rows]),
            until - begun - len(micro),
        )

    # ---- Pools ----

    def rest_of(self, pool: Pool, count: int, iterator: Iterator[Any]) -> list[Any]:
        """Give the batches that complete ``count`` pools: from the reserve, or from a stream where the data is one."""
        size = self._batch_size
        if pool.size <= size:
            return []
        if self.streaming:
            return list(itertools.islice(iterator, count * -(-(pool.size - size) // size)))
        data, drawn_from = self.loader.dataset, self.population
        sizes = reserve_sizes(size, None if pool.varies else pool.size, len(drawn_from or data))
        if self._reserve is None:
            rank = self._ranks.rank
            source = ReserveDataset(data, self.loader.collate_fn, sizes, self._seed, rank, drawn_from)
            position, parts = self.state.reserve, self.state.parts
            if parts != len(sizes):  # resumed with other pools: go on behind those that were drawn
                position = -(-position // parts) * len(sizes)
            # A batch where they come in quarters, else the rest of a pool.
            self._reserve = Reserve(source, self.loader, position, 4 if pool.varies else len(sizes))
        elif self._reserve.sizes != sizes:
            raise ValueError(
                f"A sampler asked for a pool of {pool.size} examples after pools of another size: say so, with "
                "Pool(..., varies=True)."
            )
        wanted = (pool.size - size) // reserve_unit(size) if pool.varies else len(sizes)
        return self._reserve.take(wanted * count)

    def in_passes(self, rest: list[Any]) -> list[Any]:
        """Split what completes a pool, still on the host, into what a forward pass scores; texts by their length."""
        return rest if self.streaming else in_passes(rest, self._scoring_batch_size, self._batch_size, self.padding)

    # ---- State ----

    def where(self) -> FeedState:
        """Give where reading stands now, in the middle of a step."""
        stream = self.state.stream if self._stream is None else StreamPlace(**self._stream.place())
        found = replace(self.state, visited=self._visited, stream=stream)
        if self._reserve is None:
            return found
        return replace(found, reserve=self._reserve.position, parts=len(self._reserve.sizes))

    def tensors(self) -> dict[str, Tensor]:
        """Give those of the visits in progress."""
        if self._order is None:
            return {}
        found = {"index": self._order.index, "weights": self._order.weights}
        return found if self._represents is None else {**found, "represents": self._represents}

    def load(self, state: FeedState, tensors: dict[str, Tensor], as_saved: bool, file: str) -> None:
        """Take up where a checkpoint was.

        Args:
            state: The place.
            tensors: Those of the visits in progress.
            as_saved: Whether the settings are those that it was saved with. Else visits in progress are given up:
                their micro-batches were made for other ranks or sizes.
            file: Of the tensors, for the error.

        Raises:
            ValueError: Those of the visits are missing, or hold what no run writes.
        """
        self.state = replace(state, visits=None, visited=0)
        if state.visits is None or not as_saved:
            return
        damaged = ValueError(
            f"{file}: the visits in progress are missing, or their weights are negative or not finite, or "
            "train_dataset has not the examples: it is damaged. Resume from an older checkpoint."
        )
        if "index" not in tensors or "weights" not in tensors:
            raise damaged
        visits, index = state.visits, tensors["index"]
        given = [tensors[name] for name in ("weights", "represents") if name in tensors]
        cut = len(index) < math.floor(visits.length * visits.batch_size) * self._ranks.size
        if cut or state.visited > visits.length or not _sound(index, given, len(self.loader.dataset)):
            raise damaged
        self._begin(tensors, visits, state.visited)

    def close(self) -> None:
        """End the workers of our own. Left to the garbage collector, they would be waited for, 5 s each."""
        self._reserve = self._visits = self._epoch = None


def _sound(index: Tensor, weights: list[Tensor], examples: int) -> bool:
    """Say whether these are examples of the training set, each with weights."""
    if index.dtype != torch.int32 or index.dim() != 1 or not bool(((index >= 0) & (index < examples)).all()):
        return False
    alike = all(part.dtype == torch.float32 and part.shape == index.shape for part in weights)
    return alike and all(bool((part.isfinite() & (part >= 0)).all()) for part in weights)
