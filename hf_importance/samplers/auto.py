"""Whichever costs least by what is measured: uniform steps, a scored pool, or remembered scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_importance.samplers.history import History
from hf_importance.samplers.presample import Presample
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored, Visits
from hf_importance.theory.costs import HYSTERESIS


def among_three(**settings: Any) -> Presample:
    """Give presampling that takes over, and gives way, where there is a third to choose from."""
    return Presample(**{"on_below": 1 / HYSTERESIS, "off_above": 1.0, **settings})


@dataclass
class Auto(Sampler):
    """Takes the cheapest of three prices for the noise of a uniform step: 1, presampling's, that of the memory.

    Where nothing can be remembered (a stream) it is presampling.

    Attributes:
        fresh: What scores pools.
        remembered: What draws by the table.
    """

    fresh: Presample = field(default_factory=among_three)
    remembered: History = field(default_factory=lambda: History(budget="constant_variance"))

    remembers = True

    @dataclass
    class State:
        """Those of the two."""

        fresh: Presample.State = field(default_factory=Presample.State)
        remembered: History.State = field(default_factory=History.State)

    def __post_init__(self) -> None:
        """What it scores and averages by is what its parts do, both alike."""
        self.score, self.momentum = self.fresh.score, self.fresh.momentum

    @property
    def needs_memory(self) -> bool:
        """It can do without the table."""
        return False

    @property
    def timed(self) -> bool:
        """It goes by what scoring costs."""
        return True

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins."""
        super().begin(run)
        self.fresh.begin(run)
        self.remembered.begin(run)
        self.state = self.State(self.fresh.state, self.remembered.state)

    def visits(self) -> Visits | None:
        """Draw by the table where that is cheapest."""
        otherwise = 1.0
        if self.run.clock.measured:
            otherwise = min(self.fresh.price() * (HYSTERESIS if self.remembered.state.drawn else 1), 1.0)
        found = self.remembered.cheapest(otherwise)
        if found is not None:
            self.fresh.state.on = False
        return found

    def pool(self) -> Pool | None:
        """Score pools where that is cheapest."""
        return self.fresh.pool()

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Keep rows in proportion to their scores."""
        return self.fresh.keep(pool)

    def weigh(self, weights: Tensor) -> Tensor:
        """Bias the weights of a step as presampling does."""
        return self.fresh.weigh(weights)

    def measure(self, seen: Scored) -> Sequence[float]:
        """Give what both ask for."""
        remembered = () if self.run.table is None else self.remembered.measure(seen)
        return [*self.fresh.measure(seen), *remembered]

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Let both learn."""
        fresh = len(sums) if self.run.table is None else len(sums) - 3
        self.fresh.learn(tau, sums[:fresh])
        if self.run.table is not None:
            self.remembered.learn(tau, sums[fresh:])

    @property
    def active(self) -> bool:
        """Whether one of the two is on."""
        return self.fresh.active or self.remembered.active

    @property
    def source(self) -> str:
        """Which of the two."""
        return "history" if self.remembered.active else "presample"

    @property
    def gain(self) -> float:
        """That of what is on."""
        return self.fresh.gain if self.fresh.active else self.remembered.gain

    def status(self) -> str:
        """Say the gain of the memory."""
        return self.remembered.status()

    def log_entries(self) -> dict[str, float]:
        """Give those of both."""
        entries = {**self.fresh.log_entries(), "presampling": float(self.fresh.active)}
        return entries if self.run.table is None else {**entries, **self.remembered.log_entries()}

    def load_state_dict(self, state: Any) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)  # checked first, as a whole
        self.fresh.load_state_dict(state["fresh"])
        self.remembered.load_state_dict(state["remembered"])
        self.state = self.State(self.fresh.state, self.remembered.state)
