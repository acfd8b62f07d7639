"""Which precision scoring takes, where that is left to be measured: that of training, or a cheaper one.

Both score the batches of the first steps, in turn, so that both meet the same load. A CPU without the
instructions for it computes in bf16 more slowly than in float32, and nobody can tell by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from hf_importance.objective.scorer import Scorer
from hf_importance.ranks import Ranks
from hf_importance.transfer import Mark, mark, seconds_between

logger = logging.getLogger(__name__)

TRIES = 4  # passes of each that count, behind one that warms up
# It must be cheaper by this much: below, the two are the same, and that of training has the better digits.
WORTH = 0.95
AS_TRAINING = "training"


def cheaper_than(model: torch.nn.Module, mixed: bool, device: torch.device) -> str | None:
    """Give the precision that may be cheaper on a device than that of training; None where training has it.

    Args:
        model: That is trained.
        mixed: Whether training is in mixed precision.
        device: Where the model is.
    """
    if mixed or next(model.parameters()).dtype in (torch.bfloat16, torch.float16):
        return None
    return "fp16" if device.type == "cuda" and not torch.cuda.is_bf16_supported(False) else "bf16"


class Precision:
    """Tries a cheaper precision, and takes it where it is cheaper on all ranks together.

    Args:
        scorer: Scores in it.
        ranks: Which take the same.
        device: Where the model is.
        cheaper: What is tried; None: nothing, the scorer's own stays.

    Attributes:
        chosen: What was taken, ``"training"`` for that of training; None until it is known. It is saved.
    """

    def __init__(self, scorer: Scorer, ranks: Ranks, device: torch.device, cheaper: str | None) -> None:
        self.chosen: str | None = None
        self._scorer, self._ranks, self._device, self._cheaper = scorer, ranks, device, cheaper
        self._spans: dict[str | None, list[tuple[Mark, Mark]]] = {None: [], cheaper: []}

    @property
    def known(self) -> bool:
        """Whether there is nothing to try any more."""
        return self._cheaper is None or self.chosen is not None

    def choose(self, chosen: str | None) -> None:
        """Take what was chosen before; None: nothing was."""
        if self._cheaper is not None and chosen is not None:
            self.chosen = chosen
            self._scorer.dtype = None if chosen == AS_TRAINING else chosen

    def try_out(self, score: Callable[[], object]) -> None:
        """Time a scoring pass in each; the last time take the cheaper, in one collective. All ranks must call it."""
        if self.known:
            return
        order: tuple[str | None, ...] = (None, self._cheaper)
        tries = len(self._spans[None])
        for dtype in order if tries % 2 else order[::-1]:
            self._scorer.dtype, begun = dtype, mark(self._device)
            score()
            self._spans[dtype].append((begun, mark(self._device)))
        self._scorer.dtype = None
        if tries == TRIES:
            usual, tried = self._ranks.sum([self._seconds(dtype) for dtype in order])
            logger.info("Scoring in %s takes %.2f of what it takes as in training.", self._cheaper, tried / usual)
            self.choose(self._cheaper if tried < WORTH * usual else AS_TRAINING)

    def _seconds(self, dtype: str | None) -> float:
        return min(seconds_between(*span) for span in self._spans[dtype][1:])
