"""The arguments of importance sampling, as fields that ``HfArgumentParser`` reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from transformers import TrainingArguments

from hf_importance.costs import ASSUMED_KAPPA, Budget, pays_above
from hf_importance.sampling import Resampling
from hf_importance.switching import derived_threshold

METHODS = ("presample", "history", "auto")
REMEMBERING = ("history", "auto")  # those with a table of scores
BUDGETS = get_args(Budget)
SCORES = ("upper_bound", "loss", "gradient_norm")
SCORING_DTYPES = ("bf16", "fp16", "fp32")
AUTO = "auto"  # follow the cost rule from the measured kappa
BATCH_NORM_POLICIES = ("untouched", "batch", "weighted", "running", "frozen")


@dataclass
class ImportanceArguments:
    """When and how examples are drawn by importance; any ``TrainingArguments`` can take them in.

    Raises:
        ValueError: A value is outside its range or unknown; the message names the argument, the value, and what to
            pass.
    """

    importance_sampling: bool = field(
        default=True,
        metadata={"help": "Draw examples by importance once it pays. False trains as the plain Trainer does."},
    )
    importance_method: str = field(
        default="presample",
        metadata={
            "help": "Where scores come from: 'presample' (a pool scored in a forward pass of its own, the paper's), "
            "'history' (remembered from earlier epochs, at no cost; for runs of several epochs), or 'auto' (whichever "
            "is measured to be cheapest)."
        },
    )
    importance_budget: str = field(
        default="variance",
        metadata={
            "help": "What the gain is spent on: 'variance' (batches as large as ever, less gradient noise), "
            "'constant_variance' (as much noise as ever, smaller batches, so less compute at equal steps), or "
            "'constant_time' (steps that cost what a uniform step costs, with less noise)."
        },
    )
    variance_margin: float = field(
        default=1.1,
        metadata={
            "help": "Safety margin, at least 1: 'constant_variance' keeps this many times the examples that the "
            "measured gain asks for, and history is on only while its gain exceeds it."
        },
    )
    uniform_share: float = field(
        default=0.1,
        metadata={"help": "Share of every history draw that is uniform, in (0, 1]; weights stay below its inverse."},
    )
    importance_score: str = field(
        default="upper_bound",
        metadata={
            "help": "What an example is drawn by: 'upper_bound' (norm of the loss's gradient with respect to the "
            "logits), 'loss', or 'gradient_norm' (over all trainable parameters; exact, one backward pass an example, "
            "for ablation)."
        },
    )
    # None stands in the type of this and the next field so that HfArgumentParser reads a number or a word.
    presample_ratio: float | str | None = field(
        default=None,
        metadata={
            "help": "Examples scored in an importance step for each one of the batch, B / b. Above 1, or 'auto': what "
            "is cheapest for the measured kappa and tau. By default 3, and 'auto' with importance_method='auto'."
        },
    )
    resampling: str = field(
        default="systematic",
        metadata={
            "help": "'systematic' (without replacement, less noise) or 'multinomial' (with replacement, as the paper "
            "has it)."
        },
    )
    tau_threshold: float | str | None = field(
        default=None,
        metadata={
            "help": "Tau above which importance sampling is on. Above 1, or 'auto': 1 / (1 - sqrt(kappa)) with the "
            "measured kappa; by default (B + 3b) / (3b), the paper's, and 'auto' where presample_ratio is."
        },
    )
    tau_momentum: float = field(
        default=0.9,
        metadata={"help": "Share of the old moving average of tau that each step keeps, in [0, 1)."},
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples in one scoring forward pass. By default the training batch size."},
    )
    scoring_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the scoring forward pass, by autocast: 'bf16', 'fp16' or 'fp32'. By default that of "
            "training."
        },
    )
    batch_norm: str = field(
        default="untouched",
        metadata={
            "help": "BatchNorm in importance steps: 'untouched', or normalise with the moments of the 'batch', its "
            "importance-'weighted' moments, or the 'running' statistics, while the running statistics follow the "
            "uniform pool; 'frozen': running statistics as they are, in every step."
        },
    )

    def __post_init__(self) -> None:
        """Check every value first (it needs no device), then let the next class in line do the same."""
        _check_choice("importance_method", self.importance_method, METHODS)
        _check_choice("importance_budget", self.importance_budget, BUDGETS)
        if not (math.isfinite(self.variance_margin) and self.variance_margin >= 1):
            raise ValueError(
                f"variance_margin must be a finite number of at least 1, but it is {self.variance_margin}. It is how "
                "many times the examples are kept that the measured gain asks for; 1.1 is the default."
            )
        if not 0 < self.uniform_share <= 1:
            raise ValueError(
                f"uniform_share must lie in (0, 1], but it is {self.uniform_share}. It is the share of every draw "
                "that is uniform, so that no weight passes its inverse; 0.1 is the default."
            )
        _check_choice("importance_score", self.importance_score, SCORES)
        _check_choice("batch_norm", self.batch_norm, BATCH_NORM_POLICIES)
        _check_choice("resampling", self.resampling, get_args(Resampling))
        if self.scoring_dtype is not None:
            _check_choice("scoring_dtype", self.scoring_dtype, SCORING_DTYPES)
        if self.presample_ratio is None:
            self.presample_ratio = AUTO if self.importance_method == "auto" else 3.0
        self.presample_ratio = _number_or_auto(
            "presample_ratio",
            self.presample_ratio,
            "It says how many examples are scored for each one of the batch; 3 is the default.",
        )
        if self.tau_threshold is not None:
            self.tau_threshold = _number_or_auto(
                "tau_threshold",
                self.tau_threshold,
                "tau is never below 1, so importance sampling would always be on; leave it None for the threshold "
                "derived from presample_ratio.",
            )
        if self.importance_method in REMEMBERING:
            self._check_remembering()
        if not 0 <= self.tau_momentum < 1:
            raise ValueError(
                f"tau_momentum must lie in [0, 1), but it is {self.tau_momentum}. It is the share of the old average "
                "that a step keeps; 0.9 is the default."
            )
        if self.scoring_batch_size is not None and self.scoring_batch_size < 1:
            raise ValueError(
                f"scoring_batch_size must be at least 1, but it is {self.scoring_batch_size}. Leave it None to score "
                "in batches of per_device_train_batch_size."
            )
        following = getattr(super(), "__post_init__", None)  # none where the fields stand alone
        if following is not None:
            following()

    def _check_remembering(self) -> None:
        if self.batch_norm not in ("untouched", "frozen"):
            raise ValueError(
                f"batch_norm={self.batch_norm!r} takes its running statistics from scored pools, and the steps that "
                f"importance_method={self.importance_method!r} draws by remembered scores have none. Use 'untouched' "
                "or 'frozen', or importance_method='presample'."
            )
        if self.importance_score == "gradient_norm":
            raise ValueError(
                "importance_score='gradient_norm' takes a backward pass an example, and the scores that "
                f"importance_method={self.importance_method!r} remembers come from training's own. Use 'upper_bound' "
                "or 'loss', or importance_method='presample'."
            )
        if self.importance_method == "auto" and self.tau_threshold not in (None, AUTO):
            raise ValueError(
                f"tau_threshold={self.tau_threshold} has no meaning with importance_method='auto', which goes by what "
                "each method costs. Leave it None, or use importance_method='presample'."
            )

    @property
    def ratio(self) -> float | None:
        """Pool size over batch size; None where it follows the cost rule."""
        return None if self.presample_ratio == AUTO else float(self.presample_ratio)

    @property
    def threshold_follows_kappa(self) -> bool:
        """Whether the threshold is that of the cost rule."""
        return self.tau_threshold == AUTO or (self.tau_threshold is None and self.ratio is None)

    @property
    def needs_kappa(self) -> bool:
        """Whether a decision depends on what scoring costs."""
        return self.importance_method == "auto" or (
            self.importance_method == "presample"
            and (self.threshold_follows_kappa or self.ratio is None or self.importance_budget == "constant_time")
        )

    @property
    def threshold(self) -> float:
        """τ above which it is on: the user's, the paper's for this ratio, or the cost rule's for the paper's κ."""
        if self.threshold_follows_kappa:
            return pays_above(ASSUMED_KAPPA)
        return derived_threshold(self.ratio) if self.tau_threshold is None else float(self.tau_threshold)


@dataclass
class ImportanceTrainingArguments(ImportanceArguments, TrainingArguments):
    """``TrainingArguments`` with the fields of :class:`ImportanceArguments`."""


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")


def _number_or_auto(name: str, value: float | str | None, meaning: str) -> float | str:
    if value == AUTO:
        return AUTO
    try:
        number = float(value)  # the command line gives text
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 1):
        raise ValueError(f"{name} must be a finite number above 1, or 'auto', but it is {value}. {meaning}")
    return number
