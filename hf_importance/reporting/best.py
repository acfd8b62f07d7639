"""Whether a run has passed its best evaluation loss: where it has, fewer epochs cost less than any sampling saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RISES = 2  # evaluations in a row
WORSE = 1.05  # and the last is this many times the best


def past_its_best(log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """Say so at the evaluation where it is first clear: the loss rose in two in a row, and is 5 % above the best.

    Args:
        log_history: The Trainer's, up to this evaluation; of its entries those with an ``eval_loss``, the last of each
            step.

    Returns:
        A sentence, or None: it is not clear, or was already.

    >>> losses = {100: 0.50, 200: 0.39, 300: 0.41, 400: 0.44}
    >>> log = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    >>> past_its_best(log)
    'Your run has passed its best evaluation loss at step 200 (0.39; now 0.44): fewer epochs are cheaper still.'
    >>> past_its_best(log[:-1]) is None and past_its_best([*log, {"step": 500, "eval_loss": 0.5}]) is None
    True
    """
    losses = {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry}
    steps = [step for step, loss in losses.items() if math.isfinite(loss)]
    clear = [end for end in range(RISES, len(steps)) if _clear([losses[step] for step in steps[: end + 1]])]
    if clear[:1] != [len(steps) - 1]:
        return None
    best = min(steps, key=losses.__getitem__)
    return (
        f"Your run has passed its best evaluation loss at step {best} ({losses[best]:.3g}; now "
        f"{losses[steps[-1]]:.3g}): fewer epochs are cheaper still."
    )


def _clear(losses: Sequence[float]) -> bool:
    rises = all(losses[-back] > losses[-back - 1] for back in range(1, RISES + 1))
    return rises and losses[-1] > WORSE * min(losses)
