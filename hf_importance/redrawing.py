"""Steers the baselines of :mod:`hf_importance.baselines`: a draw every few steps, by the losses of the last visits.

They have no switch. The first epoch is the Trainer's own and fills the table; from the second on every step is drawn.
A draw covers ``redraw_every`` optimizer steps, and knows the losses of all visits before it: so what a step is drawn
by is at most that many steps old, workers or not, since they load no further than the draw goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_importance import baselines
from hf_importance.batches import key_to_seed
from hf_importance.history import Pass
from hf_importance.remembering import Remembering


class Redrawing(Remembering):
    """A baseline's draws in one training run.

    Args:
        *args: As :class:`Remembering` takes them.
        progress: Gives the optimizer steps done, and those of the whole run.
        score_all: Gives indices and losses of all examples, found by a forward pass over them; the same on every rank.
    """

    def __init__(
        self, *args: Any, progress: Callable[[], tuple[int, int]], score_all: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(*args)
        self._progress, self._score_all = progress, score_all

    @property
    def at_decision(self) -> bool:
        """Whether a draw is used up, or the first one due."""
        if self.history.current is not None:
            return self.history.current.position >= self.history.current.length
        # A run that resumes another method's checkpoint has to see first how many items an example has.
        return self._progress()[0] >= self.updates and self.history.averages.examples > 0

    def decide(self, *args: Any) -> bool:
        """Bring the table up to date and draw the next steps by it. All ranks must call it."""
        self.history.current, self._batches = None, None
        self.exchange()
        step, steps = self._progress()
        every = self.settings.recompute_every
        if every is not None and step % every == 0:
            index, found = self._score_all()
            finite = found.isfinite()
            index, found = index[finite].numpy(), found[finite].float().numpy()
            self.history.scores.numpy()[index] = found
            self.history.seen.numpy()[index] = step
        self._draw(step, steps)
        return True

    def _draw(self, step: int, steps: int) -> None:
        settings, history = self.settings, self.history
        covered = settings.redraw_every
        if settings.recompute_every is not None:  # the next recomputation begins a draw
            covered = min(covered, settings.recompute_every - step % settings.recompute_every)
        left = max(self.micro_batches - self._position * self.accumulation, 1)
        length = min(covered * self.accumulation, left)
        generator = torch.Generator().manual_seed(key_to_seed(self.seed, history.passes, 6))
        if settings.importance_method == "online_batch_selection":
            order = torch.randperm(history.examples, generator=generator)
            relative = baselines.relative_by_rank(history.scores, self._pressure(step, steps), order)
        else:
            relative = baselines.relative_by_priority(history.scores, settings.priority_exponent)
        index = baselines.draw_with_replacement(relative, length * self.batch_size * self.ranks, generator)
        drawn = relative[index]
        if settings.importance_method == "online_batch_selection":
            weights = torch.ones_like(drawn)
        else:
            # The batch of an optimizer step, over all its micro-batches and ranks.
            batches = drawn.split(self.accumulation * self.batch_size * self.ranks)
            exponent = self._correction(step, steps)
            weights = torch.cat([baselines.correction_weights(batch, exponent) for batch in batches])
        inverse = (1 / drawn).float()
        history.current = Pass(
            index.int(), weights.float(), float(self.batch_size), length, history.passes, inverse=inverse
        )
        history.passes += 1

    def _pressure(self, step: int, steps: int) -> float:
        settings = self.settings
        return baselines.selection_pressure(
            settings.selection_pressure, settings.final_selection_pressure, min(step / steps, 1.0)
        )

    def _correction(self, step: int, steps: int) -> float:
        return baselines.annealed(self.settings.correction_exponent, min(step / steps, 1.0))

    def measure(self, count: float, uniform_moment: float, drawn_moment: float, items: float, examples: float) -> None:
        """Count the items of the uniform steps; there is no gain to measure where nothing is switched by it."""
        self.history.averages.items += items
        self.history.averages.examples += examples

    def log_entries(self, step: int) -> dict[str, float]:
        """Give the log entries of the method."""
        found = super().log_entries(step)
        entries = {name: found[name] for name in ("table_age", "table_share")}
        _, steps = self._progress()
        if self.settings.importance_method == "online_batch_selection":
            return {"selection_pressure": self._pressure(step, steps), **entries}
        return {"correction_exponent": self._correction(step, steps), **entries}
