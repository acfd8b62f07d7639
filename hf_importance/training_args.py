"""The arguments of importance sampling, as fields that ``HfArgumentParser`` reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from hf_importance.theory.costs import Budget
from hf_importance.values import check_choice

Method = Literal["presample", "history", "auto", "two_phase", "observe"]
Score = Literal["upper_bound", "loss"]
ScoringDtype = Literal["bf16", "fp16", "fp32", "auto"]
BatchNorm = Literal["untouched", "frozen"]
Log = Literal["basic", "all"]
AUTO = "auto"  # follow the cost rule from the measured kappa


@dataclass
class ImportanceArguments:
    """When and how examples are drawn by importance; any ``TrainingArguments`` can take them in.

    A field holds what was given. Values are checked when the object is made, when the trainer is, and when training
    starts, so that those which a search over arguments sets are checked too.

    Raises:
        ValueError: A value is outside its range or unknown; the message names the argument, the value, and what to
            pass.
    """

    importance_sampling: bool = field(
        default=True,
        metadata={"help": "Draw examples by importance once it pays. False trains as the plain Trainer does."},
    )
    importance_method: Method | None = field(
        default=None,
        metadata={
            "help": "Where scores come from: 'presample' (a pool scored in a forward pass of its own, the paper's), "
            "'history' (remembered from earlier epochs, at no cost; for runs of several epochs), 'auto' (whichever is "
            "measured to be cheapest), or 'two_phase' (as that, and pools drawn by remembered scores where these are "
            "cheaper). 'observe' trains as the plain Trainer does and says what 'auto' would have saved. By default "
            "'auto', and 'presample' where a tau_threshold is given."
        },
    )
    importance_budget: Budget | None = field(
        default=None,
        metadata={
            "help": "What the gain is spent on: 'constant_variance' (as much noise as ever, smaller batches, so less "
            "compute at equal steps), 'variance' (batches as large as ever, less gradient noise), or 'constant_time' "
            "(steps that cost what a uniform step costs, with less noise). By default 'constant_variance' where "
            "presample_ratio is 'auto' and pools are scored, else 'variance'."
        },
    )
    importance_score: Score = field(
        default="upper_bound",
        metadata={
            "help": "What an example is drawn by: 'upper_bound' (norm of the loss's gradient with respect to the "
            "logits), or 'loss'."
        },
    )
    # A str stands in the type so that HfArgumentParser reads a number or a word.
    presample_ratio: float | str | None = field(
        default=AUTO,
        metadata={
            "help": "Examples scored in an importance step for each one of the batch, B / b. Above 1, or 'auto': what "
            "is cheapest by what is measured."
        },
    )
    tau_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Tau above which presampling is on, above 1. By default it is on where, by what is measured, the "
            "noise of a uniform step costs less than one."
        },
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples in one scoring forward pass, at most. By default the training batch size, and twice as "
            "many where presample_ratio is 'auto' and the examples are no texts."
        },
    )
    scoring_dtype: ScoringDtype | None = field(
        default=None,
        metadata={
            "help": "Precision of the scoring forward pass, by autocast: 'bf16', 'fp16' or 'fp32'. By default that of "
            "training; with 'auto' bf16 where that is measured to be cheaper."
        },
    )
    batch_norm: BatchNorm = field(
        default="untouched",
        metadata={
            "help": "BatchNorm: 'untouched', so that in importance steps its statistics are those of the examples "
            "drawn, or 'frozen': running statistics as they are, in every step."
        },
    )
    importance_log: Log = field(
        default="basic",
        metadata={
            "help": "Which figures go into the log: 'basic' (tau, whether it is on, the share of steps that were, its "
            "cost relative to uniform steps, examples saved), or 'all'. The end of a run has all counts either way."
        },
    )
    importance_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More settings of the method, a dict or JSON ('{\"margin\": 1.2}'): for 'presample' margin, "
            "momentum, resampling, bias, bias_until, normalise, calibrate, kappa; for 'history' margin, share, "
            "momentum, bias, bias_until, normalise; see their classes."
        },
    )

    def __post_init__(self) -> None:
        """Check every value first (it needs no device), then let the next class in line do the same."""
        self.check()
        following = getattr(super(), "__post_init__", None)  # none where the fields stand alone
        if following is not None:
            following()

    def check(self) -> None:
        """Check every value.

        Raises:
            ValueError: One is outside its range or unknown.
        """
        check_choice("importance_method", self.importance_method, (None, *get_args(Method)))
        check_choice("importance_budget", self.importance_budget, (None, *get_args(Budget)))
        check_choice("importance_score", self.importance_score, get_args(Score))
        check_choice("scoring_dtype", self.scoring_dtype, (None, *get_args(ScoringDtype)))
        check_choice("batch_norm", self.batch_norm, get_args(BatchNorm))
        check_choice("importance_log", self.importance_log, get_args(Log))
        if self.importance_method == "history" and self.importance_budget == "constant_time":
            raise ValueError(
                "importance_budget='constant_time' has no meaning with importance_method='history', whose scores cost "
                "nothing. Use 'variance', which takes the same time, or 'constant_variance'."
            )
        if self.presample_ratio not in (None, AUTO):
            _number_above_one(
                "presample_ratio",
                self.presample_ratio,
                "It says how many examples are scored for each one of the batch; 'auto' is the default.",
                or_auto=True,
            )
        if self.tau_threshold is not None:
            _number_above_one(
                "tau_threshold",
                self.tau_threshold,
                "tau is never below 1, so importance sampling would always be on; leave it None to have it on where "
                "it pays.",
            )
        if self.scoring_batch_size is not None and self.scoring_batch_size < 1:
            raise ValueError(
                f"scoring_batch_size must be at least 1, but it is {self.scoring_batch_size}. Leave it None to score "
                "in batches of per_device_train_batch_size."
            )
        _ = self.kwargs

    # ---- What follows from the fields ----

    @property
    def method(self) -> Method:
        """Where scores come from: by default whatever is cheapest.

        Pools alone, where a τ says when they are scored, or where only they can have the score.
        """
        if self.importance_method is not None:
            return self.importance_method
        pools = self.threshold is not None or "threshold" in self.kwargs or self.kwargs.get("score") == "gradient_norm"
        return "presample" if pools else "auto"

    @property
    def ratio(self) -> float | None:
        """Pool size over batch size; None where it follows the cost rule."""
        return None if self.presample_ratio in (None, AUTO) else float(self.presample_ratio)

    @property
    def threshold(self) -> float | None:
        """τ above which presampling is on; None where it goes by its price."""
        return None if self.tau_threshold is None else float(self.tau_threshold)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The further settings of the method.

        Raises:
            ValueError: They are neither a dict nor JSON of one.
        """
        given = self.importance_kwargs
        try:
            found = json.loads(given) if isinstance(given, str) else (given or {})
        except json.JSONDecodeError as error:
            raise ValueError(
                f"importance_kwargs must be a dict or JSON of one, but it is {given!r}: {error}."
            ) from None
        if not isinstance(found, dict):
            raise ValueError(f"importance_kwargs must be a dict or JSON of one, but it is {given!r}.")
        return found

    def given(self) -> dict[str, Any]:
        """Give the arguments that go to the sampler, by their names; None where they were left as they are."""
        return {
            "importance_budget": self.importance_budget,
            "importance_score": None if self.importance_score == "upper_bound" else self.importance_score,
            "presample_ratio": self.ratio,
            "tau_threshold": self.threshold,
        }


@dataclass
class ImportanceTrainingArguments(ImportanceArguments, TrainingArguments):
    """``TrainingArguments`` with the fields of :class:`ImportanceArguments`."""


def _number_above_one(name: str, value: Any, meaning: str, or_auto: bool = False) -> None:
    try:
        number = float(value)  # the command line gives text
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 1):
        also = ", or 'auto'" if or_auto else ""
        raise ValueError(f"{name} must be a finite number above 1{also}, but it is {value}. {meaning}")
