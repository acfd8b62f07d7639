"""Every system that the experiments compare, by name: what the paper has, and what came later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import figures
import torch
from rivals import InfoBatchByTime
from transformers import TrainerCallback

from hf_importance import Sampler
from hf_importance.samplers.published import OnlineBatchSelection, Prioritized, RhoLoss, SelectiveBackprop


@dataclass(frozen=True)
class System:
    """One way to choose what is trained on.

    Attributes:
        paper: Where it is from.
        color: In every figure.
        arguments: Of ``ImportanceTrainingArguments``. Pool size and threshold are the experiment's unless given.
        sampler: Makes the sampler, where it is none that the arguments name, of the experiment and of what gives the
            share of the time that is gone.
        callbacks: Each is made of the trainer.
        line: How its line is drawn.
    """

    paper: str
    color: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sampler: Callable[[Any, Callable[[], float]], Sampler] | None = None
    callbacks: Sequence[Callable[[Any], TrainerCallback]] = ()
    line: str = "-"


OURS = "Katharopoulos and Fleuret, 2018"
# The paper draws with replacement.
PRESAMPLE = {"importance_method": "presample"}
PAPER = {**PRESAMPLE, "importance_kwargs": {"resampling": "multinomial"}}
# What is scored and kept, and when, follows what is measured.
MEASURED = {"presample_ratio": "auto", "tau_threshold": None}
SYSTEMS = {
    "uniform": System("Trainer", figures.BLACK, {"importance_sampling": False}),
    "loss": System(f"{OURS}, section 4", figures.ORANGE, {**PAPER, "importance_score": "loss"}),
    "upper_bound": System(f"{OURS}, the paper's method", figures.BLUE, PAPER),
    "upper_bound_systematic": System("the same, drawn without replacement", figures.BLUE, PRESAMPLE, line="--"),
    "cost_rule": System(
        "this package: presampling where it pays (docs/costs.md)", figures.RED, {**PRESAMPLE, **MEASURED}, line="--"
    ),
    "upper_bound_biased": System(
        f"{OURS}, the authors' bias k of 0.5: weights to that power", figures.SKY,
        {**PRESAMPLE, "importance_kwargs": {"resampling": "multinomial", "bias": 0.5}},
    ),
    "gradient_norm": System(
        f"{OURS}, section 4.1", figures.GREEN,
        {**PRESAMPLE, "importance_kwargs": {"resampling": "multinomial", "score": "gradient_norm"}},
    ),
    "auto": System(
        "this package: whichever of uniform, remembered and fresh scores is measured to be cheapest", figures.BLACK,
        {"importance_method": "auto", **MEASURED}, line="--",
    ),
    "history": System(
        "this package: remembered scores", figures.SKY, {"importance_method": "history", **MEASURED}, line="--"
    ),
    # A run ends by time, so what these two let fall or grow over the steps of a run stays at its start: constant
    # selection pressure s = 100, and beta = 0.4. The paper's own values are lost from its text.
    "online_batch_selection": System(
        "Loshchilov and Hutter, 2015", figures.RED,
        sampler=lambda experiment, gone: OnlineBatchSelection(recompute_every=experiment.recompute_every),
    ),
    "prioritized": System("Schaul et al., 2015", figures.PURPLE, sampler=lambda experiment, gone: Prioritized()),
    "selective_backprop": System(
        "Jiang et al., 2019", figures.PURPLE, sampler=lambda experiment, gone: SelectiveBackprop(), line=":"
    ),
    "infobatch": System(
        "Qin et al., 2024", figures.GREEN, sampler=lambda experiment, gone: InfoBatchByTime(gone=gone), line=":"
    ),
    "top_loss": System(
        "Mindermann et al., 2022, without the holdout model", figures.ORANGE,
        sampler=lambda experiment, gone: RhoLoss(torch.zeros(len(experiment.train)), math.ceil(experiment.ratio)),
        line=":",
    ),
}  # fmt: skip
