"""The arguments of importance sampling, as fields that ``HfArgumentParser`` reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from transformers import TrainingArguments

from hf_importance.costs import Budget
from hf_importance.learning_rate import RULES
from hf_importance.sampling import Resampling
from hf_importance.switching import derived_threshold

# Published rivals, for comparison: see hf_importance.baselines.
BASELINES = ("online_batch_selection", "prioritized")
PRESAMPLING = ("presample", "auto")  # those that may score pools
REMEMBERING = ("history", "auto", *BASELINES)  # those with a table of scores
METHODS = ("presample", *REMEMBERING)
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
            "is measured to be cheapest). For comparison: 'online_batch_selection' (Loshchilov & Hutter, 2015) and "
            "'prioritized' (Schaul et al., 2015)."
        },
    )
    importance_budget: str | None = field(
        default=None,
        metadata={
            "help": "What the gain is spent on: 'constant_variance' (as much noise as ever, smaller batches, so less "
            "compute at equal steps), 'variance' (batches as large as ever, less gradient noise), or 'constant_time' "
            "(steps that cost what a uniform step costs, with less noise). By default 'constant_variance' where "
            "presample_ratio is 'auto' and pools are scored, else 'variance'."
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
    # None stands in the type of this and of tau_threshold so that HfArgumentParser reads a number or a word.
    presample_ratio: float | str | None = field(
        default=AUTO,
        metadata={
            "help": "Examples scored in an importance step for each one of the batch, B / b. Above 1, or 'auto': what "
            "is cheapest by what is measured. 3 with resampling='multinomial' is the paper's recipe."
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
            "help": "Tau above which importance sampling is on. Above 1, or 'auto': on where, by what is measured, "
            "the noise of a uniform step costs less than one. By default 'auto' where presample_ratio is, else (B + "
            "3b) / (3b), the paper's."
        },
    )
    tau_momentum: float = field(
        default=0.9,
        metadata={"help": "Share of the old moving average of tau that each step keeps, in [0, 1)."},
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples in one scoring forward pass, at most. By default the training batch size, and twice as "
            "many where presample_ratio is 'auto' and the examples are no texts."
        },
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
    weight_exponent: float = field(
        default=1.0,
        metadata={
            "help": "Importance weights are raised to this power, in [0, 1], and rescaled. 1 leaves the gradient "
            "unbiased; below, hard examples count for more than their share, the authors' k."
        },
    )
    learning_rate_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate of each importance step by its gain ('linear') or the root of it "
            "('sqrt'), at most by 4. By default it stays the user's."
        },
    )
    selection_pressure: float = field(
        default=100.0,
        metadata={
            "help": "Online batch selection: how many times as often the highest loss is drawn as the lowest, at the "
            "start; at least 1."
        },
    )
    final_selection_pressure: float = field(
        default=1.0,
        metadata={"help": "Online batch selection: the same at the end of training, reached exponentially."},
    )
    recompute_every: int | None = field(
        default=None,
        metadata={
            "help": "Online batch selection: optimizer steps between forward passes over the whole training set that "
            "renew all losses. By default never: losses are those of the last visits."
        },
    )
    priority_exponent: float = field(
        default=0.6,
        metadata={"help": "Prioritized: alpha, the power of the loss that is drawn by, at least 0; 0 is uniform."},
    )
    correction_exponent: float = field(
        default=0.4,
        metadata={
            "help": "Prioritized: beta at the start, the power of the inverse probability in the weights, in [0, 1]; "
            "it grows linearly to 1 at the end of training."
        },
    )
    redraw_every: int = field(
        default=1,
        metadata={"help": "Online batch selection and prioritized: optimizer steps that one draw covers."},
    )

    def __post_init__(self) -> None:
        """Check every value first (it needs no device), then let the next class in line do the same."""
        _check_choice("importance_method", self.importance_method, METHODS)
        if self.importance_budget is None:
            cheaper = self.importance_method in PRESAMPLING and self.presample_ratio == AUTO
            self.importance_budget = "constant_variance" if cheaper and not self.learning_rate_scaling else "variance"
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
        self.presample_ratio = _number_or_auto(
            "presample_ratio",
            self.presample_ratio,
            "It says how many examples are scored for each one of the batch; 'auto' is the default.",
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
        self._check_ranges()
        if self.importance_method in BASELINES:
            self._check_baseline()
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

    def _check_ranges(self) -> None:
        """Check the fields of the average, of the baselines, of the bias and of the learning rate."""
        if not 0 <= self.tau_momentum < 1:
            raise ValueError(
                f"tau_momentum must lie in [0, 1), but it is {self.tau_momentum}. It is the share of the old average "
                "that a step keeps; 0.9 is the default."
            )
        _check_range("weight_exponent", self.weight_exponent, 0, 1, "At 1, the default, the gradient is unbiased.")
        _check_range("selection_pressure", self.selection_pressure, 1, math.inf, "1 is uniform; 100 is the default.")
        end = self.final_selection_pressure
        _check_range("final_selection_pressure", end, 1, math.inf, "1 is uniform, and the default.")
        _check_range("priority_exponent", self.priority_exponent, 0, math.inf, "0 is uniform; 0.6 is the default.")
        _check_range("correction_exponent", self.correction_exponent, 0, 1, "It grows to 1; 0.4 is the default.")
        for name, steps in {"recompute_every": self.recompute_every, "redraw_every": self.redraw_every}.items():
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1 optimizer step, but it is {steps}.")
        if self.recompute_every is not None and self.importance_method != "online_batch_selection":
            raise ValueError(
                f"recompute_every={self.recompute_every} belongs to importance_method='online_batch_selection', but "
                f"the method is {self.importance_method!r}. Leave it None."
            )
        if self.learning_rate_scaling is not None:
            _check_choice("learning_rate_scaling", self.learning_rate_scaling, RULES)
            if self.importance_budget != "variance":
                raise ValueError(
                    f"learning_rate_scaling={self.learning_rate_scaling!r} spends the gain on longer steps, and "
                    f"importance_budget={self.importance_budget!r} on cheaper ones. Use one of the two: "
                    "importance_budget='variance', or learning_rate_scaling=None."
                )

    def _check_baseline(self) -> None:
        """Refuse what a published baseline does not have, so that nothing is thought to act that does not."""
        method = self.importance_method
        if self.importance_score != "loss":
            raise ValueError(
                f"importance_method={method!r} draws by the loss, but importance_score is {self.importance_score!r}. "
                "Pass importance_score='loss'."
            )
        fixed = {"importance_budget": "variance", "weight_exponent": 1.0, "learning_rate_scaling": None}
        for name, value in fixed.items():
            given = getattr(self, name)
            if given != value:
                raise ValueError(
                    f"{name}={given!r} has no meaning with importance_method={method!r}, whose gradient is biased and "
                    f"whose gain is not measured. Leave it {value!r}, or use importance_method='presample' or "
                    "'history'."
                )

    @property
    def ratio(self) -> float | None:
        """Pool size over batch size; None where it follows the cost rule."""
        return None if self.presample_ratio == AUTO else float(self.presample_ratio)

    @property
    def goes_by_price(self) -> bool:
        """Whether it is on where the cost rule says that it pays, whatever τ is."""
        derived = self.ratio is None or self.importance_method == "auto"
        return self.tau_threshold == AUTO or (self.tau_threshold is None and derived)

    @property
    def needs_kappa(self) -> bool:
        """Whether a decision depends on what scoring costs."""
        return self.importance_method == "auto" or (
            self.importance_method == "presample"
            and (self.goes_by_price or self.ratio is None or self.importance_budget == "constant_time")
        )

    @property
    def measures_variance(self) -> bool:
        """Whether a decision depends on what drawing without replacement does to the variance."""
        planned = self.needs_kappa or self.importance_budget == "constant_variance" or self.learning_rate_scaling
        return bool(self.importance_method in PRESAMPLING and self.resampling == "systematic" and planned)

    @property
    def threshold(self) -> float | None:
        """τ above which it is on: the user's, or the paper's for this ratio; None where it goes by the price."""
        if self.goes_by_price:
            return None
        return derived_threshold(self.ratio) if self.tau_threshold is None else float(self.tau_threshold)


@dataclass
class ImportanceTrainingArguments(ImportanceArguments, TrainingArguments):
    """``TrainingArguments`` with the fields of :class:`ImportanceArguments`."""


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")


def _check_range(name: str, value: float, low: float, high: float, meaning: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        expected = f"a finite number of at least {low}" if high == math.inf else f"a number from {low} to {high}"
        raise ValueError(f"{name} must be {expected}, but it is {value}. {meaning}")


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
