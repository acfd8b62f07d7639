"""What importance sampling would have done, in a run that stays the plain Trainer's to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from hf_importance.checkpoint.schema import COUNT, number
from hf_importance.samplers.auto import Auto
from hf_importance.samplers.sampler import Facts, Pool, Scored, Visits
from hf_importance.theory.costs import ON_BELOW


@dataclass
class Observation:
    """What would have been, so far."""

    steps: Annotated[int, COUNT] = 0  # optimizer steps seen
    first: int | None = None  # the one from which on it would have been on
    presample: Annotated[int, COUNT] = 0  # steps in which presampling would have been cheapest
    history: Annotated[int, COUNT] = 0  # and those of the memory
    compute: Annotated[float, number(0, 1e300)] = 0.0  # of all, in uniform steps


@dataclass
class Observe(Auto):
    """Never on: measures what :class:`Auto` measures, and counts what each step would have cost for the same noise.

    How a careful user begins. The prices are those of uniform steps' scores: what would have been learnt by being on
    (the memory of a run by history is of its own draws) is not in them.
    """

    @dataclass
    class State(Auto.State):
        """Those of the two, and what would have been."""

        seen: Observation = field(default_factory=Observation)

    def begin(self, run: Facts) -> None:
        """Forget everything, for a run begins."""
        super().begin(run)
        self.state.seen = Observation()

    def visits(self) -> Visits | None:
        """Calibrate, and draw nothing."""
        self.remembered.calibrate()
        return None

    def pool(self) -> Pool | None:
        """Score nothing."""
        return None

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Keep the batch as it is: it is never asked."""
        raise NotImplementedError("Observe asks for no pool.")

    def learn(self, tau: float, sums: Sequence[float]) -> None:
        """Let both learn, and count what this step would have cost."""
        super().learn(tau, sums)
        seen, presample = self.state.seen, self.fresh.price() if self.fresh.state.on else 1.0
        memory = math.inf if self.run.table is None else self.remembered.price
        history = memory if memory < ON_BELOW else 1.0
        seen.steps += 1
        cheapest = min(presample, history, 1.0)
        if cheapest < 1:
            seen.first = self.run.step() if seen.first is None else seen.first
            name = "presample" if presample <= history else "history"
            setattr(seen, name, getattr(seen, name) + 1)
        seen.compute += cheapest

    @property
    def active(self) -> bool:
        """Never."""
        return False

    def outcome(self) -> dict[str, float]:
        """Give what would have been: share of steps, compute over that of uniform steps, and from which step on."""
        seen = self.state.seen
        steps = max(seen.steps, 1)
        entries = {
            "would_be_on_share": (seen.presample + seen.history) / steps,
            "would_be_compute": seen.compute / steps if seen.steps else 1.0,
        }
        return entries if seen.first is None else {**entries, "would_be_on_from_step": seen.first}

    def log_entries(self) -> dict[str, float]:
        """Give those of both, and what would have been."""
        return {**super().log_entries(), **self.outcome()}

    def sentence(self) -> str:
        """Say what would have been."""
        seen = self.state.seen
        if seen.first is None:
            tau = self.run.tau()
            return (
                f"Observed {seen.steps} steps: importance sampling would have stayed off (tau {tau:.2f}, price of "
                f"presampling {self.fresh.price():.2f} of a uniform step). It pays where most examples are learnt: "
                "more epochs, or a cheaper scoring pass (scoring_dtype)."
            )
        by = " and ".join(["presampling"] * (seen.presample > 0) + ["history"] * (seen.history > 0))
        return (
            f"Observed {seen.steps} steps: importance sampling would have been on from step {seen.first}, in "
            f"{seen.presample + seen.history} steps, by {by}, for {seen.compute / seen.steps:.0%} of the compute of "
            "uniform steps. Train without importance_method='observe' to have it."
        )

    def load_state_dict(self, state: Any) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.state.seen = Observation(**state["seen"])
