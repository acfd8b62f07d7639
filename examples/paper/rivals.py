"""Published methods (``hf_importance.samplers.published``) where a run ends by time, not by steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_importance import Visits
from hf_importance.samplers.published import InfoBatch


@dataclass
class InfoBatchByTime(InfoBatch):
    """InfoBatch whose last part, in which nothing is left out, is that of the time. On one process only.

    Attributes:
        gone: Gives the share of the time that is gone.
    """

    gone: Callable[[], float] = float  # none

    def visits(self) -> Visits | None:
        """At the start of an epoch, name what it visits."""
        return None if self.gone() >= self.annealing else super().visits()
