"""Every system that the experiments compare, by name: what the paper has, and what came later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import figures
from rivals import InfoBatchTrainer, SelectiveBackpropTrainer, TopLossTrainer
from transformers import Trainer

from hf_importance import ImportanceTrainer


@dataclass(frozen=True)
class System:
    """One way to choose what is trained on.

    Attributes:
        paper: Where it is from.
        color: In every figure.
        arguments: Of ``ImportanceTrainingArguments``. Pool size and threshold are the experiment's unless given.
        trainer: The class that trains.
        options: Further arguments of that class.
        line: How its line is drawn.
    """

    paper: str
    color: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[Trainer] = ImportanceTrainer
    options: Mapping[str, Any] = field(default_factory=dict)
    line: str = "-"


OURS = "Katharopoulos and Fleuret, 2018"
# The paper draws with replacement.
PAPER = {"resampling": "multinomial"}
SYSTEMS = {
    "uniform": System("Trainer", figures.BLACK, {"importance_sampling": False}),
    "loss": System(f"{OURS}, section 4", figures.ORANGE, {**PAPER, "importance_score": "loss"}),
    "upper_bound": System(f"{OURS}, the paper's method", figures.BLUE, PAPER),
    "upper_bound_systematic": System(
        "the same, drawn without replacement", figures.BLUE, {"resampling": "systematic"}, line="--"
    ),
    "cost_rule": System(
        "this package: what is scored and kept follows what is measured (docs/costs.md)", figures.RED,
        {"resampling": "systematic", "presample_ratio": "auto", "tau_threshold": "auto"}, line="--",
    ),
    "upper_bound_biased": System(
        f"{OURS}, the authors' bias k of 0.5: weights to that power", figures.SKY, {**PAPER, "weight_exponent": 0.5}
    ),
    "gradient_norm": System(f"{OURS}, section 4.1", figures.GREEN, {**PAPER, "importance_score": "gradient_norm"}),
    "auto": System(
        "this package: whichever of uniform, remembered and fresh scores is measured to be cheapest", figures.BLACK,
        {"importance_method": "auto", "presample_ratio": "auto", "tau_threshold": "auto"}, line="--",
    ),
    "history": System("this package: remembered scores", figures.SKY, {"importance_method": "history"}, line="--"),
    # A run ends by time, so what these two let fall or grow over the steps of a run stays at its start: constant
    # selection pressure s = 100, and beta = 0.4. The paper's own values are lost from its text.
    "online_batch_selection": System(
        "Loshchilov and Hutter, 2015", figures.RED,
        {"importance_method": "online_batch_selection", "importance_score": "loss", "recompute_every": 600},
    ),
    "prioritized": System(
        "Schaul et al., 2015", figures.PURPLE, {"importance_method": "prioritized", "importance_score": "loss"}
    ),
    "selective_backprop": System("Jiang et al., 2019", figures.PURPLE, trainer=SelectiveBackpropTrainer, line=":"),
    "infobatch": System("Qin et al., 2024", figures.GREEN, trainer=InfoBatchTrainer, line=":"),
    "top_loss": System(
        "Mindermann et al., 2022, without the holdout model", figures.ORANGE, trainer=TopLossTrainer, line=":"
    ),
}  # fmt: skip
